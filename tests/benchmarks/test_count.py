"""benchmarks/count.py: what it counts of a small pass against closed formulas, real tensors and counts by hand."""

import sys
from math import prod
from typing import Any

import pytest
import torch
from conftest import REPOSITORY
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode
from transformers import Qwen3Config, Qwen3ForCausalLM

sys.path.append(str(REPOSITORY / "benchmarks"))  # at the end: its names are plain ones

import count as counting
import memory
from count import NONE, OWN_FORMULAS, Ledger, Row, count_pass, fused_bytes, moved

from kpo_cli.core import load_objective
from kpo_cli.policy.attention import NAME
from kpo_cli.policy.batch import Batch, make_batch
from kpo_cli.policy.response import Response
from kpo_cli.policy.scorer import Scorer, pack

CPU = torch.device("cpu")
HEADS, SIZE, VOCABULARY, HIDDEN, LAYERS = 4, 16, 500, 64, 2
LENGTHS = ((3, 40, 25, 31), (9, 12, 33, 38))
PROMPT = 6


def config(layers: int = LAYERS) -> Qwen3Config:
    return Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=96,
        num_hidden_layers=layers,
        num_attention_heads=HEADS,
        num_key_value_heads=2,
        head_dim=SIZE,
        tie_word_embeddings=True,
    )


@pytest.fixture(scope="module")
def batch() -> Batch:
    groups = [[Response([1] * n, [0.0] * n, True) for n in lengths] for lengths in LENGTHS]
    return make_batch([[1] * PROMPT] * 2, groups, torch.zeros(8), torch.zeros(8))


def ledger_of(model: Any) -> Ledger:
    return Ledger({p.shape for p in model.parameters() if p.dim() == 2})


@pytest.mark.parametrize("half", [False, True])
def test_fake_tensors_count_as_real_ones_do(batch: Batch, half: bool) -> None:
    cast = counting.autocast(half)
    with memory.on_fake_tensors(config(), batch) as job, ledger_of(job.model) as fake, cast:
        job.run()
    model = Qwen3ForCausalLM(config()).eval()
    model.set_attn_implementation(NAME)
    counted, cast = FlopCounterMode(display=False, custom_mapping=OWN_FORMULAS), counting.autocast(half)
    with memory._without_numbers(pack(batch, CPU)), counted as torchs, ledger_of(model) as real, cast:
        memory._pass(Scorer(model, 1.0, packed=True), load_objective("grpo"), batch)
    assert fake.count == real.count
    assert sum(part.flops for part in real.count.parts.values()) == torchs.get_total_flops()


def pairs(batch: Batch) -> int:
    """Of a token and one that it looks at, in buckets."""
    shapes = [bucket.shape for bucket in pack(batch, CPU).packing.buckets]
    return sum(rows * length * (length + 1) // 2 for rows, length in shapes)


@pytest.mark.parametrize("kept", [None, NONE], ids=["kept", "recomputed"])
def test_flops_are_those_of_the_closed_formula(batch: Batch, kept: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """6 N M + 6 V D R + 12 L H d P, and what is computed twice: logits, scores, and in recomputed layers all but the
    last product, which nothing behind it needs."""
    monkeypatch.setattr(counting.log_probs, "KEPT_LOGITS", 0)
    parts = count_pass(config(), batch, Row(autocast=False, kept=kept)).parts
    tokens, predicted = 2 * PROMPT + sum(sum(lengths) - 4 for lengths in LENGTHS), sum(map(sum, LENGTHS))
    down = HIDDEN * 96
    body = LAYERS * (2 * HIDDEN * SIZE * (HEADS + 2) + 3 * down)
    again = 0 if kept is None else 2 * (body - LAYERS * down) * tokens
    assert parts["layers: products"].flops == 6 * body * tokens + again
    assert parts["head: products"].flops == 6 * VOCABULARY * HIDDEN * predicted
    assert parts["head: weight gradient"].flops == 2 * VOCABULARY * HIDDEN * predicted
    forward = 4 * LAYERS * HEADS * SIZE * pairs(batch)
    assert parts["attention"].flops == (3.5 if kept is None else 4.5) * forward


def test_all_is_linear_in_the_number_of_layers(batch: Batch) -> None:
    one, two, three = (count_pass(config(layers), batch, Row(autocast=True)) for layers in (1, 2, 3))
    for name, part in one.with_layers(3, two).parts.items():
        wanted = three.parts[name]
        assert (part.flops, part.bytes) == (wanted.flops, wanted.bytes), name
        assert (part.seconds, part.computing) == pytest.approx((wanted.seconds, wanted.computing))


A, B = torch.zeros(8, 16), torch.zeros(8, 16)
HALF, PLACES = torch.zeros(16, 32, dtype=torch.bfloat16), torch.zeros(5, dtype=torch.long)


@pytest.mark.parametrize(
    ("run", "size"),
    [
        (lambda: A + B, 3 * 512),
        (lambda: A + 1.0, 2 * 512),
        (lambda: A + B[:1], 2 * 512 + 64),
        (lambda: A + B[:, :1].expand(8, 16), 2 * 512 + 32),
        (lambda: A.mul_(B), 3 * 512),
        (lambda: A.copy_(B), 2 * 512),
        (lambda: A.zero_(), 512),
        (lambda: torch.zeros_like(A), 512),
        (lambda: torch.empty_like(A), 0),
        (lambda: A.t().view(2, 8, 8), 0),
        (lambda: A.to(torch.bfloat16), 512 + 256),
        (lambda: A.sum(-1), 512 + 32),
        (lambda: torch.mul(A, B, out=torch.empty(8, 16)), 3 * 512),
        (lambda: A.bfloat16() @ HALF, 512 + 256 + 256 + 1024 + 512),
        (lambda: torch.addmm(A, B, B.t() @ B, beta=0), 512 + 512 + 1024 + 1024 + 512 + 512),
        (lambda: torch.nn.functional.embedding(PLACES, A), 40 + 2 * 5 * 64),
        (lambda: A.scatter_(-1, torch.zeros(8, 1, dtype=torch.long), torch.ones(8, 1)), 64 + 32 + 64 + 2 * 32),
    ],
)
def test_bytes_by_hand(run: Any, size: int) -> None:
    with ledger_of(torch.nn.Linear(1, 1)) as ledger:
        run()
    assert sum(part.bytes for part in ledger.count.parts.values()) == size


def head_bytes(temperature: float, batch: Batch, monkeypatch: pytest.MonkeyPatch) -> float:
    """Of a logit, beside the products: what four rows more cost."""
    monkeypatch.setattr(memory, "Scorer", lambda model, _, *half, packed: Scorer(model, temperature, *half, packed))
    monkeypatch.setattr(counting.log_probs, "KEPT_LOGITS", 0)
    parts = (batch.rows(torch.arange(rows)) for rows in (4, 8))
    few, many = (count_pass(config(1), part, Row(autocast=True)).parts["head: element-wise"].bytes for part in parts)
    return (many - few) / (VOCABULARY * sum(LENGTHS[1]))


def test_passes_over_logits(batch: Batch, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward softmax 8, two maxima 8, difference 8, product 12, sum 4; backward difference 8, exponential 8, scale 8
    and the gradient 6, which is written as narrow as its products read it. A division by 1 is none."""
    plain = head_bytes(1.0, batch, monkeypatch)
    assert 70 < plain < 73  # and hidden states, a few bytes over so small a vocabulary
    assert head_bytes(0.7, batch, monkeypatch) - plain == pytest.approx(16)


def test_fused_kernels_by_hand() -> None:
    def graph(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        y = (x * 2).relu()  # one kernel with the sum: reads x, writes y for the product and the sum
        total = y.sum(-1, keepdim=True)
        z = y @ w
        return (z.t() + x.t()).exp(), total  # another: reads z and x through views, writes what is given back

    x, w = torch.zeros(8, 16), torch.zeros(16, 16)
    made = make_fx(graph, tracing_mode="fake")(x, w).graph
    assert fused_bytes(made) == 4 * ((128 + 128 + 8) + (128 + 128 + 128))


def test_compiled_layers_compute_the_products_that_eager_ones_do(batch: Batch) -> None:
    eager, fused = (count_pass(config(1), batch, Row(False, fused)).parts for fused in (False, True))
    assert fused["layers: products"].flops == eager["layers: products"].flops
    assert fused["layers: gathers"].bytes == eager["layers: gathers"].bytes
    assert fused["attention"] == eager["attention"]
    assert fused["layers: element-wise"].bytes < 0.5 * eager["layers: element-wise"].bytes


def test_moved_knows_what_is_written_only() -> None:
    out = torch.empty(8, 16)
    assert moved(torch.ops.aten.mul.out, (A, B), {"out": out}, out) == 3 * 4 * prod(A.shape)
