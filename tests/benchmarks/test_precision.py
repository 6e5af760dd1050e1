"""benchmarks/precision.py: float64 is transformers' own, the arithmetics are what they are called, sizes come out."""

import math
import sys
from collections.abc import Callable, Iterator
from copy import deepcopy
from itertools import pairwise
from statistics import NormalDist
from typing import Any

import pytest
import torch
from conftest import REPOSITORY
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

sys.path.append(str(REPOSITORY / "benchmarks"))  # at the end: its names are plain ones

import arithmetics
import precision
from arithmetics import ARITHMETICS, REFERENCE, Arithmetic, InFloat64, Pass, masters_of, on_grid, spread

from kpo_cli.core import group_normalised, load_objective
from kpo_cli.core.filters import Identity
from kpo_cli.policy.batch import Batch, make_batch
from kpo_cli.policy.response import Response

EVERY = pytest.mark.parametrize("arithmetic", [REFERENCE, *ARITHMETICS], ids=lambda a: a.name)
SHARDED_FLOAT32 = Arithmetic("float32 by FSDP", torch.float32, sharded=True)


@pytest.fixture(scope="module", autouse=True)
def process_group() -> Iterator[None]:
    """FSDP's, of one process: gone behind these tests."""
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def named(name: str) -> Arithmetic:
    return next(a for a in ARITHMETICS if a.name == name)


@pytest.fixture(scope="module")
def model() -> Any:
    return precision.random_source("64x2", 0, 4, "cpu").model


def rows_of(lengths: tuple[int, ...], group: int = 4) -> Batch:
    """Random tokens; half of each group is right."""
    draw = torch.Generator().manual_seed(0)

    def tokens(count: int) -> list[int]:
        return torch.randint(precision.VOCABULARY, (count,), generator=draw).tolist()

    answers = [Response(tokens(count), [0.0] * count, True) for count in lengths]
    groups = [answers[start : start + group] for start in range(0, len(answers), group)]
    rewards = torch.tensor([1.0, 0.0]).repeat(len(lengths) // 2)
    prompts = [tokens(5 + i) for i in range(len(groups))]
    return make_batch(prompts, groups, rewards, group_normalised(rewards, group).advantages)


@pytest.fixture(scope="module")
def batch() -> Batch:
    return rows_of((3, 9, 12, 7, 1, 6, 12, 2))


def eager(plain: Any, batch: Batch) -> Tensor:
    """Log-probabilities by transformers alone, a row at a time, from its logits."""
    out = torch.zeros(batch.response_ids.shape, dtype=torch.float64)
    for row in range(len(batch)):
        prompt, count = int(batch.prompt_lengths[row]), int(batch.response_mask[row].sum())
        ids = torch.cat([batch.prompt_ids[row, :prompt], batch.response_ids[row, :count]])
        logits = plain(input_ids=ids[None]).logits[0, prompt - 1 : -1]
        out[row, :count] = logits.log_softmax(-1).gather(-1, batch.response_ids[row, :count, None])[:, 0]
    return out.detach()


def test_float64_is_transformers_own(model, batch):
    plain = type(model)(deepcopy(model.config)).double().eval()
    plain.load_state_dict(model.state_dict())
    plain.set_attn_implementation("eager")
    values = Pass(model, REFERENCE).log_probs(batch)
    assert values.dtype == torch.float64
    # Left alone, transformers rounds its norms, rotations and softmaxes to float32 in a model of float64.
    torch.testing.assert_close(values, eager(plain, batch), rtol=0, atol=3e-5)
    with InFloat64():
        torch.testing.assert_close(values, eager(plain, batch), rtol=0, atol=1e-12)


def test_nothing_in_float64_is_narrower(model, batch):
    seen: set[torch.dtype] = set()

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            made = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
            seen.update(leaf.dtype for leaf in made if leaf.numel())
            return out

    computing = Pass(model, REFERENCE)
    with Watch(), torch.no_grad(), InFloat64():
        arithmetics.token_values(computing.model, batch)
    assert seen == {torch.float64}


@EVERY
def test_a_step_of_zero_leaves_z_at_zero(arithmetic, model, batch):
    computing, masters = Pass(model, arithmetic), masters_of(model)
    after = precision.stepped(model, masters, [batch, batch], [0.0, 1e-3])
    old = computing.load(masters).log_probs(batch)
    assert torch.equal(computing.load(after[0.0]).log_probs(batch), old)
    assert not torch.equal(computing.load(after[1e-3]).log_probs(batch), old)


def test_fsdp_in_float32_is_the_plain_pass_to_the_bit(model, batch):
    masters = spread(masters_of(model), torch.Generator().manual_seed(1))
    plain, sharded = (Pass(model, a).load(masters) for a in (named("float32"), SHARDED_FLOAT32))
    assert torch.equal(sharded.log_probs(batch), plain.log_probs(batch))
    mine, theirs = sharded.gradient(batch).values, plain.gradient(batch).values
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    assert torch.equal(sharded.log_probs(batch), plain.log_probs(batch)), "also behind a backward pass"


@pytest.mark.parametrize("name", ["bf16 weights", "fp16 weights"])
def test_cast_weights_are_a_model_of_that_type(name, model, batch):
    """FSDP computes what transformers does with a model that was cast."""
    computing = Pass(model, named(name))
    cast = Pass(model, named("float32"))
    for parameter in cast.model.parameters():
        parameter.data = parameter.data.to(computing.arithmetic.dtype)
    with computing._arithmetic(), torch.no_grad():
        expected = arithmetics.token_values(cast.model, batch)
    assert torch.equal(computing.log_probs(batch), expected)


@pytest.mark.parametrize("name", ["bf16 weights", "bf16 weights, float32 residual", "autocast bf16"])
def test_the_residual_stream_is_what_it_is_called(name, model, batch):
    computing, into, products = Pass(model, named(name)), set(), set()
    for layer in computing.model.get_decoder().layers:
        layer.register_forward_pre_hook(lambda _, inputs: into.add(inputs[0].dtype))
        layer.mlp.down_proj.register_forward_hook(lambda _, inputs, out: products.add(out.dtype))
    computing.log_probs(batch)
    assert into == {torch.bfloat16 if name == "bf16 weights" else torch.float32}
    assert products == {torch.bfloat16}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_products_are_those_of_torch_but_for_ties(dtype):
    draw = torch.Generator().manual_seed(0)
    a, b = (torch.randn(40, 40, generator=draw).to(dtype) for _ in range(2))
    with arithmetics.RoundedOnce():
        ours = (a @ b, torch.addmm(b, a, b), a[None] @ b[None])
    exact = [(a.double() @ b.double()), b.double() + a.double() @ b.double(), (a.double() @ b.double())[None]]
    for value, truth in zip(ours, exact, strict=True):
        assert value.dtype == dtype
        # The nearest number of that type, but where float32's last bits decide.
        assert (value == truth.to(dtype)).float().mean() > 0.99
    assert (ours[0] == a @ b).float().mean() > 0.99


def test_logits_of_16_bits_are_not_rounded(model, batch, monkeypatch):
    """As on a GPU. The head alone is in 16 bits here, so that nothing else rounds."""
    hidden = torch.randn(6, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    weight = model.get_output_embeddings().weight.detach().bfloat16() * 3
    ids = torch.arange(6)
    exact = (hidden.double() @ weight.double().T).log_softmax(-1).gather(-1, ids[:, None])[:, 0]

    def error() -> float:
        values, _ = arithmetics.Scorer.__call__.__globals__["linear_log_probs"](hidden, weight, ids, 1.0)
        return float((values - exact).abs().max())

    assert error() > 1e-3, "a CPU rounds them"
    monkeypatch.setattr("kpo_cli.core.log_probs._matmul", arithmetics._matmul_as_on_a_gpu)
    assert error() < 1e-5


def test_a_loss_scale_that_overflows_is_halved_and_counted(model, batch, monkeypatch):
    computing = Pass(model, named("fp16 weights"))
    quiet = computing.gradient(batch)
    monkeypatch.setattr(arithmetics, "LOSS_SCALE", 2.0**30)
    loud = computing.gradient(batch)
    assert quiet.overflows < loud.overflows <= 30
    truth = Pass(model, REFERENCE).gradient(batch).values
    assert precision.relative(loud.values, truth) < 0.02


def test_the_count_has_what_a_pass_cannot_do_without(model, batch):
    """Gradients are there at the end; casting adds a copy of a layer's weights at the least."""
    masters = sum(value.nbytes for value in masters_of(model).values())
    plain = Pass(model, named("float32")).count(batch)
    assert plain > masters
    assert Pass(model, SHARDED_FLOAT32).count(batch) < 2 * plain
    assert Pass(model, REFERENCE).count(batch) == pytest.approx(2 * plain, rel=0.05)


def test_spread_masters_stay_in_their_cells():
    masters = {"a": torch.randn(2000, generator=torch.Generator().manual_seed(0)), "b": torch.tensor([1.0, -2.0, 0.0])}
    grid = on_grid(masters)
    moved = spread(masters, torch.Generator().manual_seed(1))
    for name in masters:
        assert torch.equal(moved[name].bfloat16(), grid[name].bfloat16())
    assert float((moved["a"] != grid["a"]).float().mean()) > 0.99
    ulp = 2.0 ** (torch.frexp(grid["a"]).exponent - 8)
    place = (moved["a"] - grid["a"]) / ulp
    assert place.abs().max() <= 0.5
    assert place.std() == pytest.approx(12**-0.5, rel=0.05), "evenly"
    assert abs(place.mean()) < 0.04


def test_the_share_of_changed_weights():
    before = {"a": torch.ones(3), "b": torch.ones(1)}
    after = {"a": torch.tensor([1.0, 1.003, 1.005]), "b": torch.tensor([0.999])}  # bf16 has 0.996, 1 and 1.0078 there
    assert arithmetics.changed_share(before, after) == 1 / 4


def even_batch(rows: int, length: int) -> Batch:
    return rows_of((length,) * rows)


def noise_of(sigma: float, batch: Batch) -> Tensor:
    draw = torch.Generator().manual_seed(3)
    return sigma * torch.randn(batch.response_mask.shape, generator=draw, dtype=torch.float64)


def test_an_error_of_known_size_comes_out_as_that_size():
    batch, sigma, length = even_batch(400, 64), 0.01, 64
    zero = torch.zeros(batch.response_mask.shape, dtype=torch.float64)
    found = precision.compared((zero - 1, noise_of(sigma, batch) - 1), (zero - 1, zero - 1), batch)
    assert found["error"] == pytest.approx(sigma, rel=0.02)
    assert found["z"] == pytest.approx(sigma, rel=0.02)
    assert found["switches"] == pytest.approx(0.5, abs=0.02)
    noise = {name: method["noise"] for name, method in found["methods"].items()}
    assert noise["grpo"] == pytest.approx(sigma / 0.2, rel=0.02)
    assert noise["grpo_tight"] == pytest.approx(sigma / 3e-4, rel=0.02)
    assert noise["gspo"] == pytest.approx(sigma / 3e-4 / length**0.5, rel=0.1)
    assert all(method["white"] == pytest.approx(1, abs=0.1) for method in found["methods"].values())
    # One of two advantages, +1 and -1, cuts at one end: z above log(1 + 4e-4) or below log(1 - 3e-4).
    normal = NormalDist(0, sigma)
    cut = (1 - normal.cdf(math.log1p(4e-4)) + normal.cdf(math.log1p(-3e-4))) / 2
    assert found["methods"]["grpo_tight"]["differ"] == pytest.approx(cut, abs=0.01)
    assert found["methods"]["grpo_tight"]["cut"] == pytest.approx(cut, abs=0.01)


def test_an_error_that_is_the_same_at_each_token_is_not_white():
    batch = even_batch(8, 64)
    zero = torch.zeros(batch.response_mask.shape, dtype=torch.float64)
    found = precision.compared((zero, zero + 0.01), (zero, zero), batch)
    assert found["methods"]["gspo"]["noise"] == pytest.approx(0.01 / 3e-4)
    assert found["methods"]["gspo"]["white"] == pytest.approx(8)


def test_log_ratios_that_overflowed_are_counted():
    batch = even_batch(8, 4)
    zero = torch.zeros(batch.response_mask.shape)
    bad = zero.clone()
    bad[0, :3] = math.inf
    assert precision.compared((zero, bad), (zero.double(), zero.double()), batch) == {"overflown": 3}


def kalman_by_hand(length: int, q: float) -> float:
    """Variance of the state under white noise of size 1, by the recursion; root of its mean over tokens."""
    p, variance, total = 0.0, 0.0, 0.0
    for _ in range(length):
        k = (p + q) / (p + q + 1)
        variance, p = (1 - k) ** 2 * variance + k**2, (1 - k) * (p + q)
        total += variance
    return (total / length) ** 0.5


def test_what_a_filter_leaves_of_noise():
    assert precision.gain(load_objective("grpo"), (7, 30)) == pytest.approx(1)
    assert precision.gain(load_objective("gspo"), (64,)) == pytest.approx(1 / 8)
    for q in (1e-6, 1e-3):
        objective = load_objective("kpo", q=q)
        assert precision.gain(objective, (200,)) == pytest.approx(kalman_by_hand(200, q), rel=1e-9)


def test_methods_are_those_of_the_project():
    assert isinstance(precision.METHODS["grpo_tight"].ratio_filter, Identity)
    assert precision.METHODS["kpo"] == load_objective("kpo")


@pytest.fixture
def command(monkeypatch, capsys) -> Callable[..., str]:
    def run(*given: str) -> str:
        monkeypatch.setattr(sys, "argv", ["precision.py", *given])
        precision.main()
        return capsys.readouterr().out

    return run


def test_the_command_and_its_tables(command, tmp_path):
    file = tmp_path / "results.jsonl"
    out = command("--quick", "--results", str(file), "--lrs", "1e-5")
    for arithmetic in (REFERENCE, *ARITHMETICS):
        assert f"| checkpoint | 1e-05 | {arithmetic.name} |" in out
        assert f"| trained | 1e-05 | {arithmetic.name} |" in out
    assert command("--table", str(file)) in out
    errors = {r["arithmetic"]: r["error"] for r in precision.read(file) if r.get("masters") == "trained" and "lr" in r}
    worse = [errors[name] for name in ("float64", "float32", "autocast fp16", "autocast bf16")]
    assert all(one < other / 2 for one, other in pairwise(worse))


def test_rows_that_are_no_groups_are_refused(command, capsys):
    with pytest.raises(SystemExit):
        command("--rows", "6")
    assert "--rows must be a multiple of 4" in capsys.readouterr().err


def test_a_model_that_is_not_there_is_one_line(command, tmp_path):
    with pytest.raises(SystemExit, match="no such model directory"):
        command("--model", str(tmp_path / "nowhere"))


def test_a_seed_is_other_weights_and_a_range_is_shown():
    one, same, other = (precision.random_source("32x1", seed, 2, "cpu") for seed in (0, 0, 1))
    assert torch.equal(one.model.lm_head.weight, same.model.lm_head.weight)
    assert not torch.equal(one.model.lm_head.weight, other.model.lm_head.weight)
    assert one.prompts == same.prompts != other.prompts
    assert precision.spanned([0.011, 0.03, 0.02]) == "0.02 (0.011-0.03)"
    assert precision.spanned([0.5, 0.5]) == "0.5"
    assert precision.spanned([118.4, 118.4, 20.0]) == "118 (20-118)"
    assert precision.spanned([None]) == ""
