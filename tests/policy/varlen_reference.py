"""torch's `varlen_attn` in plain torch: what its page says, a segment and a head at a time, in any type, on any device.

The page: `window_size` is (left, right), -1 for no bound; with `enable_gqa` each key-value head serves as many query
heads, next to each other. That the last query of a segment stands at its last key is flash-attention's rule.
"""

import torch
from torch import Tensor


def varlen_reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False,
) -> Tensor:
    """(M, heads, size of values). 16 bits in, 16 bits out, float32 between, as the kernel has it.

    Raises ValueError for what the kernel would not take.
    """
    lengths = [(ends[1:] - ends[:-1]).tolist() for ends in (cu_seq_q, cu_seq_k)]
    if {cu_seq_q.dtype, cu_seq_k.dtype} != {torch.int32}:
        raise ValueError("lengths are int32")
    if [max(each) for each in lengths] != [max_q, max_k] or [sum(each) for each in lengths] != [len(query), len(key)]:
        raise ValueError("lengths do not fit")
    if (query.shape[1] != key.shape[1]) != enable_gqa or query.shape[1] % key.shape[1]:
        raise ValueError("heads do not fit")
    wide = query.dtype if query.dtype == torch.float64 else torch.float32
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    shared = query.shape[1] // key.shape[1]
    segments = []
    for q, k, v in zip(query.split(lengths[0]), key.split(lengths[1]), value.split(lengths[1]), strict=True):
        if not 0 < len(q) <= len(k):
            raise ValueError(f"{len(q)} queries and {len(k)} keys")
        place = torch.arange(len(q), device=q.device)[:, None] + len(k) - len(q)
        other = torch.arange(len(k), device=q.device)
        seen = torch.ones(len(q), len(k), dtype=torch.bool, device=q.device)
        if window_size[0] >= 0:
            seen &= other >= place - window_size[0]
        if window_size[1] >= 0:
            seen &= other <= place + window_size[1]
        heads = []
        for head in range(query.shape[1]):
            one = q[:, head].to(wide), k[:, head // shared].to(wide), v[:, head // shared].to(wide)
            weights = (scale * one[0] @ one[1].T).masked_fill(~seen, -torch.inf).softmax(-1)
            heads.append(weights @ one[2])
        segments.append(torch.stack(heads, dim=1))
    return torch.cat(segments).to(query.dtype)
