"""What rounding does to log-ratios, against sums by hand."""

import math

import pytest
import torch
from reference import kalman

from kpo_cli.core import load_objective
from kpo_cli.core.rounding import Rounding, narrower_width


def rms(values):
    return math.sqrt(sum(value * value for value in values) / len(values))


@pytest.mark.parametrize("seed", range(3))
def test_it_is_what_sums_by_hand_give(seed):
    draw = torch.Generator().manual_seed(seed)

    def normal(size):
        return torch.randn(3, 7, generator=draw, dtype=torch.float64) * size

    mask = torch.arange(7) < torch.tensor([7, 1, 4])[:, None]
    exact_old, z = normal(1), normal(1e-3)
    old, new = exact_old + normal(1e-4), exact_old + z + normal(1e-4)
    advantages = torch.tensor([1.0, -1.0, 0.5], dtype=torch.float64)
    objective = load_objective("kpo", q=0.25, v=1.0, eps_low=3e-4, eps_high=4e-4)
    found = Rounding.of(objective, (old, new), (exact_old, exact_old + z), advantages, mask)
    rows = [row[keep].tolist() for row, keep in zip(z, mask, strict=True)]
    rounded = [row[keep].tolist() for row, keep in zip(new - old, mask, strict=True)]
    flat = [(a, b) for pair in zip(rounded, rows, strict=True) for a, b in zip(*pair, strict=True)]
    smooth = [[kalman(row, 0.25, 1.0) for row in part] for part in (rounded, rows)]
    behind = [(a, b) for pair in zip(*smooth, strict=True) for a, b in zip(*pair, strict=True)]
    assert (found.responses, found.tokens, found.width) == (3, 12, 3e-4)
    assert found.z == pytest.approx(rms([b for _, b in flat]))
    assert found.z_error == pytest.approx(rms([a - b for a, b in flat]))
    assert found.filtered_error == pytest.approx(rms([a - b for a, b in behind]))
    assert found.widths == pytest.approx(found.filtered_error / 3e-4)

    def cut(x, advantage):
        return x > math.log1p(4e-4) if advantage > 0 else x < math.log1p(-3e-4)

    signs = [1, 1, 1, 1, 1, 1, 1, -1, 0.5, 0.5, 0.5, 0.5]
    differ = [cut(a, sign) != cut(b, sign) for (a, b), sign in zip(behind, signs, strict=True)]
    assert found.decided == pytest.approx(sum(differ) / 12)
    assert found.decides


def test_exact_numbers_have_no_rounding():
    old, mask = torch.zeros(2, 5), torch.ones(2, 5, dtype=torch.bool)
    found = Rounding.of(load_objective("grpo"), (old, old + 0.5), (old, old + 0.5), torch.ones(2), mask)
    assert (found.z, found.z_error, found.filtered_error, found.decided) == (0.5, 0, 0, 0)
    assert not found.decides


@pytest.mark.parametrize(
    ("method", "width"),
    [("grpo", 0.2), ("grpo_tight", 3e-4), ("gspo", 3e-4), ("kpo_unclipped", None), ("sapo", None), ("cispo", None)],
)
def test_the_width_is_the_narrower_one(method, width):
    assert narrower_width(load_objective(method)) == width
