"""The engine's tensors against those pushed, on stand-ins for an engine's model that store them as vLLM does."""

import pytest
import torch
from torch import nn

from kpo_cli.rollout import held
from kpo_cli.rollout.held import compare


class Attention(nn.Module):
    def __init__(self, bias):
        super().__init__()
        self.qkv_proj = nn.Linear(4, 6 + 2 + 2, bias=bias)
        self.o_proj = nn.Linear(6, 4, bias=False)


class Engine(nn.Module):
    packed_modules_mapping = {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}  # noqa: RUF012

    def __init__(self, bias=True, rows=64):
        super().__init__()
        self.embed = nn.Embedding(rows, 4)
        self.attention = Attention(bias)
        self.scale = nn.Parameter(torch.tensor(2.0))


def pushed_of(engine, vocabulary=50):
    """What a transformers model would have pushed into it, copies."""
    weights = {"embed.weight": engine.embed.weight[:vocabulary]}
    for kind, tensor in engine.attention.qkv_proj.named_parameters():
        for name, part in zip("qkv", tensor.split([6, 2, 2]), strict=True):
            weights[f"attention.{name}_proj.{kind}"] = part
    weights |= {"attention.o_proj.weight": engine.attention.o_proj.weight, "scale": engine.scale}
    return {name: tensor.detach().clone() for name, tensor in weights.items()}


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(held, "BLOCK", 12)  # three rows of four


def verdict(engine, weights, dtype=torch.float32):
    return compare(engine, iter(weights.items()), dtype, 1)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equal_is_equal(bias, dtype):
    engine = Engine(bias)
    weights = pushed_of(engine)
    found = verdict(engine.to(dtype), weights, dtype)
    assert found.equal == {name for name, _ in engine.named_parameters()}
    assert not found.differing | found.unknown


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_number_of_any_tensor_is_seen(dtype):
    """The last bit, in every row: those of each fused part, and at the ends of what is compared at a time."""
    engine = Engine().to(dtype)
    weights = pushed_of(engine)
    for name, tensor in weights.items():
        for row in range(max(1, len(tensor) if tensor.dim() else 1)):
            old = tensor.clone()
            place = tensor.view(-1) if not tensor.dim() else tensor[row].view(-1)[-1:]
            place.copy_(torch.nextafter(place, torch.full_like(place, 9.0)))
            assert not torch.equal(old, tensor)
            found = verdict(engine, weights, dtype)
            assert len(found.differing) == 1, (name, row)
            assert not found.unknown
            tensor.copy_(old)
    assert not verdict(engine, weights, dtype).differing


def test_what_was_not_pushed_wholly_is_unknown():
    engine = Engine()
    weights = pushed_of(engine)
    for name in weights:
        found = verdict(engine, {n: t for n, t in weights.items() if n != name})
        assert len(found.unknown) == 1
        assert not found.differing
    swapped = dict(reversed(weights.items()))  # v before q: then the rows cannot be told
    assert verdict(engine, swapped).unknown == {"attention.qkv_proj.weight", "attention.qkv_proj.bias"}
    other = weights | {"attention.o_proj.weight": torch.zeros(6, 4)}  # a layer that stores the transpose
    assert verdict(engine, other).unknown == {"attention.o_proj.weight"}
    more = weights | {"attention.rotary.inv_freq": torch.zeros(3)}  # of no use to the engine
    assert not verdict(engine, more).unknown


def test_only_a_vocabulary_has_rows_to_spare():
    engine = Engine(rows=128)
    weights = pushed_of(engine, vocabulary=65)
    assert not verdict(engine, weights).unknown
    assert verdict(engine, weights | {"embed.weight": engine.embed.weight.detach()[:64]}).unknown == {"embed.weight"}


def test_nan_is_equal_to_nan_and_to_nothing_else():
    """Weights that exploded were pushed as they are: it is not the push that failed."""
    engine = Engine()
    weights = pushed_of(engine) | {"scale": torch.tensor(torch.nan)}
    weights["attention.k_proj.weight"][1, 2] = torch.nan
    assert verdict(engine, weights).differing == {"attention.qkv_proj.weight", "scale"}
    with torch.no_grad():
        engine.attention.qkv_proj.weight[7, 2] = engine.scale.fill_(torch.nan)
    assert not verdict(engine, weights).differing
    weights["attention.k_proj.weight"][1, 2] = 0.0
    assert verdict(engine, weights).differing == {"attention.qkv_proj.weight"}


class Packed(nn.Module):
    """A linear layer of vLLM's CPU back end: what is left of its weight is a function."""

    def __init__(self, weight):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(0, dtype=weight.dtype))
        self.cpu_linear = lambda x, _weight, bias: nn.functional.linear(x, weight, bias)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_packed_matrix_is_read_back_by_multiplying(dtype):
    engine = Engine(bias=False)
    weights = pushed_of(engine)
    engine = engine.to(dtype)
    engine.attention.qkv_proj = Packed(engine.attention.qkv_proj.weight.detach().clone())
    engine.attention.o_proj = Packed(engine.attention.o_proj.weight.detach().clone())
    found = verdict(engine, weights, dtype)
    assert {"attention.qkv_proj.weight", "attention.o_proj.weight"} <= found.equal
    assert not found.differing | found.unknown
    for name in ("attention.k_proj.weight", "attention.o_proj.weight"):
        late = weights | {name: weights[name] * 1.01}
        assert len(verdict(engine, late, dtype).differing) == 1
    short = weights | {"attention.v_proj.weight": torch.zeros(3, 4)}
    assert verdict(engine, short, dtype).differing == {"attention.qkv_proj.weight"}
