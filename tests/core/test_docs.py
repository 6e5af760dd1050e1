"""Every Python block of the core's documentation runs, in order; a filter is added as docs/methods.md tells."""

import re
from pathlib import Path

import pytest
import torch

from kpo_cli.core import list_methods, load_objective
from kpo_cli.core.aggregation import AGGREGATIONS
from kpo_cli.core.filters import FILTERS
from kpo_cli.core.methods import METHODS
from kpo_cli.core.surrogates import SURROGATES

DOCS = Path(__file__).parents[2] / "docs"


@pytest.fixture
def registries():
    """What a test registers is gone afterwards."""
    kept = [(registry, dict(registry)) for registry in (FILTERS, METHODS, SURROGATES, AGGREGATIONS)]
    yield
    for registry, before in kept:
        registry.clear()
        registry.update(before)


def run_blocks(name):
    """Run the blocks of a page as one program; returns its names."""
    text = (DOCS / name).read_text()
    namespace = {"__name__": "docs"}
    blocks = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    assert blocks
    for block in blocks:
        exec(compile(block, f"docs/{name}", "exec"), namespace)
    return namespace


def test_every_block_of_the_api_page_runs(registries):
    run_blocks("api.md")


def test_a_filter_is_added_in_three_steps(registries):
    """The three steps of docs/methods.md, and then the new method is held to what every method must do."""
    run_blocks("methods.md")
    assert "window_kpo" in list_methods()
    objective = load_objective("window_kpo", width=3, eps_low=0.1, eps_high=0.1)
    generator = torch.Generator().manual_seed(0)
    z = 0.3 * torch.randn(4, 50, generator=generator)
    mask = torch.rand(4, 50, generator=generator) < 0.9
    log_probs = torch.where(mask, z - 1, float("nan")).requires_grad_()
    out = objective(
        log_probs=log_probs,
        old_log_probs=torch.full_like(z, -1.0),
        advantages=torch.tensor([1.0, -1.0, 0.0, 2.0]),
        response_mask=mask,
    )
    for row in range(4):
        for t in mask[row].nonzero().flatten().tolist():
            seen = [float(z[row, u]) for u in range(max(0, t - 2), t + 1) if mask[row, u]]
            assert float(out.filtered_log_ratio[row, t]) == pytest.approx(sum(seen) / len(seen), abs=1e-6)
    out.loss.backward()
    assert log_probs.grad.isfinite().all()
    assert out.clipped.any()


def test_a_filter_of_a_module_with_postponed_annotations_works_too(registries):
    namespace = {}
    exec(
        "from __future__ import annotations\n"
        "import dataclasses, torch\n"
        "@dataclasses.dataclass(frozen=True)\n"
        "class Half:\n"
        "    q: float = 1.0\n"
        "    straight_through = True\n"
        "    def __call__(self, z, mask, old_log_probs):\n"
        "        return torch.where(mask, z / 2, 0.0)\n",
        namespace | {"__name__": "builtins"},
        namespace,
    )
    FILTERS["half"] = namespace["Half"]
    METHODS["half"] = type(METHODS["kpo"])("half", "unclipped", "token_mean", "mine")
    assert load_objective("half", q=0.5).ratio_filter.q == 0.5
    assert load_objective("half", time_constant=10).ratio_filter.q == pytest.approx(0.01, rel=1e-2)


def test_the_table_of_methods_is_complete():
    text = (DOCS / "methods.md").read_text()
    rows = [line for line in text.splitlines() if line.startswith("|")]
    for name in (*METHODS, *FILTERS):
        assert any(f"`{name}`" in row for row in rows), name
