"""Advantages from the rewards of a group."""

from typing import NamedTuple

import torch
from torch import Tensor


class GroupAdvantages(NamedTuple):
    advantages: Tensor
    """(N,) float32, one a response."""
    zero_variance: Tensor
    """(N / group_size,) bool: groups whose known rewards are all equal; their advantages are exactly 0."""


def group_normalised(
    rewards: Tensor, group_size: int, epsilon: float = 1e-6, divide_by_std: bool = True
) -> GroupAdvantages:
    """A = (r - mean) / (std + epsilon) inside each group (GRPO, 2402.03300, section 4.1.2).

    `rewards` (N,) holds whole groups, one after the other; NaN is a response of which nothing is known: it is left out
    of its group's mean and standard deviation, and its advantage is 0. The standard deviation is the sample one
    (n - 1), as in the authors' code; `divide_by_std=False` leaves it out (Dr. GRPO, 2503.20783). A group without
    variance gets exactly 0, not rounding noise over epsilon.
    """
    if group_size < 2:
        raise ValueError(f"group_size={group_size} must be at least 2: an advantage is relative to the group")
    if rewards.dim() != 1 or rewards.numel() % group_size:
        raise ValueError(f"rewards of shape {tuple(rewards.shape)} do not make whole groups of {group_size}")
    if bool(rewards.isinf().any()):
        row = int(rewards.isinf().nonzero()[0])
        raise ValueError(f"reward {row} is {float(rewards[row])}; a reward must be finite, or NaN where it is unknown")
    groups = rewards.to(torch.float64).view(-1, group_size)
    known = ~groups.isnan()
    lowest, highest = groups.nan_to_num(torch.inf).amin(-1), groups.nan_to_num(-torch.inf).amax(-1)
    zero_variance = lowest >= highest
    centred = (groups - groups.nanmean(-1, keepdim=True)).nan_to_num(0.0)
    variance = centred.square().sum(-1, keepdim=True) / (known.sum(-1, keepdim=True) - 1).clamp(min=1)
    advantages = centred / (variance.sqrt() + epsilon) if divide_by_std else centred
    advantages = torch.where(zero_variance[:, None], 0.0, advantages)
    return GroupAdvantages(advantages.flatten().float(), zero_variance)
