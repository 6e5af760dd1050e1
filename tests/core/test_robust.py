"""The compiled paths of the robust filter: numba on CPU, Triton on GPU (here under its interpreter)."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kpo_cli.core import robust
from kpo_cli.core.filters import RobustKalman

CODE = """
import torch
from kpo_cli.core.robust import _triton_kernel, launch_triton, saturated_scan_torch

generator = torch.Generator().manual_seed(0)
for rows, length in ((1, 1), (3, 7), (4, 33)):
    z = torch.randn(rows, length, generator=generator, dtype=torch.float64)
    gains = torch.rand(rows, length, generator=generator, dtype=torch.float64)
    gains[0, 0] = 0.0
    for kappa in (0.3, float("inf")):
        limit = kappa * torch.ones_like(z)
        got = launch_triton(_triton_kernel(), z, gains, limit)
        assert torch.allclose(got, saturated_scan_torch(z, gains, limit), rtol=1e-15, atol=0), (rows, length)
    transposed = launch_triton(_triton_kernel(), z.t().contiguous().t(), gains, limit)
    assert torch.equal(transposed, got)
print("equal")
"""


def example(rows=5, length=70):
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(rows, length, generator=generator, dtype=torch.float64)
    gains = torch.rand(rows, length, generator=generator, dtype=torch.float64)
    gains[:, ::7] = 0.0
    return z, gains, 0.1 + torch.rand(rows, length, generator=generator, dtype=torch.float64)


def test_numba_equals_torch():
    pytest.importorskip("numba")
    z, gains, limit = example()
    want = robust.saturated_scan_torch(z, gains, limit)
    assert robust._numba_loop() is not None
    assert torch.allclose(robust.saturated_scan(z, gains, limit), want, rtol=1e-14, atol=0)
    strided = robust.saturated_scan(z.t().contiguous().t(), gains, limit)
    assert torch.allclose(strided, want, rtol=1e-14, atol=0)
    infinite = robust.saturated_scan(z, gains, torch.full_like(z, float("inf")))
    assert torch.allclose(infinite, robust.saturated_scan_torch(z, gains, limit + 1e30), rtol=1e-14, atol=0)


def test_triton_equals_torch():
    pytest.importorskip("triton")
    # In a process of its own: Triton decides for its interpreter when it is imported.
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    process = subprocess.run(
        [sys.executable, "-c", CODE], env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    if "only 0-dimensional arrays can be converted" in process.stderr:
        pytest.skip("the interpreter of Triton 3.6 does not run with numpy 2.4")
    assert process.stdout.strip() == "equal", process.stderr[-2000:]


def test_without_either_the_filter_works_and_imports_neither(monkeypatch):
    """Both packages are hidden in a fresh process; neither is looked for before a robust filter is used."""
    code = """
import sys
sys.modules["numba"] = sys.modules["triton"] = None
import torch
from kpo_cli.core import load_objective, robust
z = torch.linspace(-1, 1, 40).view(2, 20)
out = load_objective("robust_kpo")(
    log_probs=z, old_log_probs=z * 0, advantages=torch.ones(2), response_mask=torch.ones(2, 20)
)
assert robust._numba_loop() is None and robust._triton_kernel() is None
print(out.filtered_log_ratio.shape)
"""
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert process.stdout.strip() == "torch.Size([2, 20])", process.stderr[-2000:]


def test_inputs_with_a_gradient_are_taken_as_constants():
    z = torch.randn(2, 9, dtype=torch.float64, requires_grad=True)
    assert not RobustKalman()(z, torch.ones(2, 9, dtype=torch.bool), z).requires_grad


def test_core_imports_no_compiler_at_the_top():
    for path in Path(robust.__file__).parent.glob("*.py"):
        for line in path.read_text().splitlines():
            assert not line.startswith(("import numba", "import triton", "from numba", "from triton")), path
