"""Varlen attention: the kernel itself needs a GPU; all around it is held to float64 with plain torch in its place."""

import copy
import inspect
from dataclasses import replace
from functools import cache, partial

import pytest
import torch
from small_runs import model_config
from test_scorer import PACKED, SHAPE, VOCABULARY, ragged_batch, tiny, values_and_gradients
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import GraniteConfig, Olmo2Config, SmolLM3Config
from varlen_reference import varlen_reference

from kpo_cli.core.methods import METHODS, load_objective
from kpo_cli.policy import kernels, load
from kpo_cli.policy.attention import Packing
from kpo_cli.policy.batch import make_batch
from kpo_cli.policy.fidelity import Way, WideSoftmax, choose_way
from kpo_cli.policy.kernels import Asked, choose_kernel, kernels_for
from kpo_cli.policy.response import Response
from kpo_cli.policy.scorer import Scorer, pack
from kpo_cli.policy.sharding import full
from kpo_cli.policy.varlen import Segments, installed_kernels

MODELS = PACKED | {
    "granite": GraniteConfig(**SHAPE, attention_multiplier=0.7, residual_multiplier=0.5, embedding_multiplier=3.0),
    "olmo2": Olmo2Config(**SHAPE, pad_token_id=0),
    "smollm3": SmolLM3Config(**SHAPE, pad_token_id=0),
}
CPU = torch.device("cpu")
REFERENCE = partial(Segments.of, kernel=varlen_reference, narrow=False)


class Plain:
    """The untouched model in float64: eager attention, a row at a time."""

    def __init__(self, model, temperature):
        config = copy.deepcopy(model.config)
        self.model = type(model)._from_config(config, attn_implementation="eager").double().eval()
        self.model.load_state_dict(model.state_dict())
        if config._experts_implementation is not None:
            self.model.set_experts_implementation("eager")  # a grouped product has no float64
        self.temperature = temperature

    def __call__(self, batch, entropy_gradient=True):
        log_probs, entropies = (torch.zeros(batch.response_mask.shape, dtype=torch.float64) for _ in range(2))
        for row in range(len(batch)):
            prompt = batch.prompt_ids[row, : batch.prompt_lengths[row]]
            response = batch.response_ids[row, batch.response_mask[row]]
            with WideSoftmax():
                logits = self.model(torch.cat([prompt, response])[None]).logits[0, len(prompt) - 1 : -1]
            log_p = (logits.double() / self.temperature).log_softmax(-1)
            count = len(response)
            log_probs[row, :count] = log_p.gather(-1, response[:, None]).squeeze(-1)
            entropies[row, :count] = -(log_p.exp() * log_p).sum(-1)
        return log_probs, entropies


def packable(name):
    model = tiny(MODELS[name])
    assert choose_way(model).packed
    return model


def three_ways(model, temperature):
    """Padded, in buckets, and by segments with plain torch for a kernel."""
    yield "padded", Scorer(model, temperature)
    yield "buckets", Scorer(model, temperature, packed=True)
    yield "varlen", Scorer(model, temperature, packed=True, layout=REFERENCE)


def batch_of(groups, seed=0):
    """From (tokens of the prompt, tokens of each response)."""
    draw = torch.Generator().manual_seed(seed)

    def tokens(count):
        return torch.randint(1, VOCABULARY, (count,), generator=draw).tolist()

    answers = [[Response(tokens(n), [0.0] * n, True) for n in lengths] for _, lengths in groups]
    rows = sum(map(len, answers))
    return make_batch([tokens(prompt) for prompt, _ in groups], answers, torch.zeros(rows), torch.zeros(rows))


def held_to_float64(model, batch, bound=2e-5):
    truth = values_and_gradients(Plain(model, 0.7), batch)
    for name, scorer in three_ways(model, 0.7):
        got = values_and_gradients(scorer, batch)
        for one, two in zip(got[:2], truth[:2], strict=True):
            assert (one - two).abs().max() < bound, name
        assert len(got[2]) == len(truth[2])
        for one, two in zip(got[2], truth[2], strict=True):
            assert (one - two).abs().max() < bound * max(1, two.abs().max()), name


@pytest.mark.parametrize("name", MODELS)
def test_padded_buckets_and_varlen_are_float64_in_value_and_gradient(name):
    held_to_float64(packable(name), ragged_batch())


@pytest.mark.parametrize(
    "groups",
    [
        [(5, [7])],
        [(5, [1])],
        [(1, [1]), (1, [2])],
        [(3, [1, 1, 1]), (4, [1, 6, 1])],
        [(13, [2, 9, 1, 30, 1, 1, 4, 17, 3, 8, 12, 5])],
        [(20, [3, 5]), (1, [40, 2])],
    ],
    ids=[
        "one row",
        "one row of a token",
        "prompts of a token",
        "rows without tokens",
        "a prompt for 12",
        "long, short",
    ],
)
@pytest.mark.parametrize("name", ["llama", "mistral with a window"])  # of 4 tokens: shorter than prompts
def test_rows_of_every_length(name, groups):
    held_to_float64(packable(name), batch_of(groups))


@cache
def example():
    model, batch = packable("qwen3"), ragged_batch()
    noise = 0.05 * torch.randn(batch.response_ids.shape, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        return model, batch, Scorer(model, 1.0)(batch)[0] + noise


@pytest.mark.parametrize("method", METHODS)
def test_the_loss_of_every_method_is_the_same_on_every_path(method):
    model, batch, old = example()
    results = {}
    for name, scorer in (("float64", Plain(model, 1.0)), *three_ways(model, 1.0)):
        scorer.model.zero_grad()
        log_probs, _ = scorer(batch)
        out = load_objective(method)(
            log_probs=log_probs,
            old_log_probs=old.to(log_probs),
            advantages=batch.advantages,
            response_mask=batch.response_mask,
        )
        out.loss.backward()
        results[name] = out.loss.detach(), [p.grad.clone() for p in scorer.model.parameters()]
    loss, gradients = results.pop("float64")
    scale = max(g.abs().max() for g in gradients)
    assert scale > 0
    for name, (other, others) in results.items():
        torch.testing.assert_close(other.double(), loss.double(), atol=1e-6, rtol=1e-5, msg=name)
        for one, two in zip(others, gradients, strict=True):
            assert (one - two).abs().max() < 2e-5 * scale, name


# Segments


def test_each_token_is_a_query_once_and_prompts_are_gathered_with_their_rows():
    batch = batch_of([(3, [1, 4, 1, 3]), (2, [3])])
    segments = pack(batch, CPU, REFERENCE).packing
    # The first response has no token to see; the second's three follow the prompt, and the fourth's two do.
    assert segments.places.tolist() == [0, 1, 2, *(0, 1, 2, 3, 4, 5), *(0, 1, 2, 6, 7), *(8, 9, 10, 11)]
    assert segments.query_ends.tolist() == [0, 3, 6, 8, 12]
    assert segments.key_ends.tolist() == [0, 3, 9, 14, 18]
    assert segments.longest == (4, 6)
    assert segments.query_ends.dtype == segments.key_ends.dtype == torch.int32


def test_responses_to_two_prompts_in_turns():
    batch = batch_of([(3, [4, 1, 3]), (5, [2, 6])]).rows(torch.tensor([3, 0, 1, 4, 2]))
    held_to_float64(packable("mistral with a window"), batch)


@pytest.mark.parametrize("rows", [([1, 2], [0, 3]), ([0, 2], [0, 1]), ([0, 1], [3, 2])])
def test_rows_that_do_not_follow_each_other_are_refused(rows):
    with pytest.raises(ValueError, match="own tokens do not stand behind"):
        REFERENCE(list(map(torch.tensor, rows)), 4, CPU)


def brute_force(q, k, v, queries, keys, window):
    """One query at a time, in float64: a segment's queries are the last of its keys."""
    out, first, base = [], 0, 0
    for count, seen in zip(queries, keys, strict=True):
        for i in range(count):
            last = base + seen - count + i
            start = base if window is None else max(base, last - window + 1)
            heads = []
            for head in range(q.shape[1]):
                own = head // (q.shape[1] // k.shape[1])
                weights = (k[start : last + 1, own] @ q[first + i, head] * q.shape[2] ** -0.5).softmax(0)
                heads.append(weights @ v[start : last + 1, own])
            out.append(torch.stack(heads))
        first, base = first + count, base + seen
    return torch.stack(out)


@pytest.mark.parametrize("window", [None, 1, 2, 5, 50])
def test_the_stand_in_is_causal_at_the_bottom_right(window):
    queries, keys = [3, 1, 5, 2], [3, 7, 6, 9]
    draw = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(n, heads, 8, generator=draw).double()
        for n, heads in ((sum(queries), 4), (sum(keys), 2), (sum(keys), 2))
    )
    ends = [torch.tensor([0, *lengths]).cumsum(0).int() for lengths in (queries, keys)]
    size = (-1 if window is None else window - 1, 0)
    got = varlen_reference(q, k, v, *ends, 5, 9, window_size=size, enable_gqa=True)
    torch.testing.assert_close(got, brute_force(q, k, v, queries, keys, window), atol=1e-12, rtol=0)


def test_what_a_kernel_gets_is_16_bits_in_every_segment_of_a_recomputed_layer():
    model, batch, types = packable("qwen3"), ragged_batch(), []

    def listening(query, key, value, *lengths, **options):
        types.append({query.dtype, key.dtype, value.dtype})
        return varlen_reference(query, key, value, *lengths, **options)

    load.recompute_layers(model)
    truth = values_and_gradients(Plain(copy.deepcopy(model), 1.0), batch)
    load.narrow(model, torch.bfloat16)
    values = {}
    for name, layout in (("buckets", Packing.of), ("varlen", partial(Segments.of, kernel=listening))):
        values[name] = values_and_gradients(Scorer(model, 1.0, half=True, packed=True, layout=layout), batch)
    assert types == [{torch.bfloat16}] * 4  # two layers, forward and again
    for part in (0, 2):
        want = flat(truth[part])
        off = {name: (flat(map(full, got[part])) - want).norm() for name, got in values.items()}
        assert off["varlen"] < 1.3 * off["buckets"]


def flat(tensors):
    return torch.cat([tensor.double().flatten() for tensor in tensors])


# The installed torch


def varlen_2_10(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False, return_aux=None):
    raise AssertionError


def varlen_2_11(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None, window_size=(-1, -1)
):
    return ("2.11", key.shape[1], cu_seq_q, cu_seq_k, max_q, max_k, scale, window_size)


def varlen_2_13(
    query,
    key,
    value,
    cu_seq_q,
    cu_seq_k,
    max_q,
    max_k,
    *,
    return_aux=None,
    scale=None,
    window_size=(-1, -1),
    enable_gqa=False,
    seqused_k=None,
    block_table=None,
    num_splits=None,
):
    return ("2.13", key.shape[1], cu_seq_q, cu_seq_k, max_q, max_k, scale, window_size, enable_gqa, num_splits)


def given_to(function, key_heads, monkeypatch):
    """What each way to call it passes: heads of keys, lengths, and options."""
    module = pytest.importorskip("torch.nn.attention.varlen")
    monkeypatch.setattr(module, "varlen_attn", function)
    q, k = torch.zeros(5, 4, 8), torch.zeros(9, key_heads, 8)
    options = {"scale": 0.5, "window_size": (3, 0), "enable_gqa": key_heads < 4}
    return [kernel(q, k, k, "q", "k", 3, 4, **options) for kernel in installed_kernels()]


def test_torch_is_called_as_its_signature_has_it(monkeypatch):
    shared = ("q", "k", 3, 4, 0.5, (3, 0))
    assert given_to(varlen_2_10, 2, monkeypatch) == []  # no scale and no window: it cannot be used
    assert given_to(varlen_2_11, 2, monkeypatch) == [("2.11", 2, *shared), ("2.11", 4, *shared)]
    grouped, expanded = ("2.13", 2, *shared, True), ("2.13", 4, *shared, False)
    assert given_to(varlen_2_13, 2, monkeypatch) == [(*grouped, 1), (*grouped, None), (*expanded, 1), (*expanded, None)]
    assert given_to(varlen_2_13, 4, monkeypatch)[0] == ("2.13", 4, *shared, False, 1)


def test_a_torch_without_varlen_attention_has_no_kernels(monkeypatch):
    monkeypatch.delattr("torch.nn.attention.varlen.varlen_attn")
    assert installed_kernels() == ()


@pytest.mark.parametrize("name", ["llama", "mistral with a window"])
def test_the_installed_torch_takes_what_it_is_given(name):
    """Its own function, to the door of its kernel: fake tensors have shapes and types, and go no further."""
    found = installed_kernels()
    known = inspect.signature(found[0].function).parameters
    assert {kernel.flagged for kernel in found} == {"enable_gqa" in known}
    assert found[0].unsplit == ("num_splits" in known)
    (asked,) = asked_by(name)
    for kernel in found:
        segments = pack(batch_of([(3, [4, 1, 3])]), CPU, partial(Segments.of, kernel=kernel)).packing
        fake = FakeTensorMode()
        places, *ends = (fake.from_tensor(t) for t in (segments.places, segments.query_ends, segments.key_ends))
        segments = replace(segments, places=places, query_ends=ends[0], key_ends=ends[1])
        with fake:
            q, k, v = (
                torch.empty(1, heads, 8, 8, dtype=torch.bfloat16, requires_grad=True)
                for heads in (asked.heads, asked.key_heads, asked.key_heads)
            )
            out = segments.attend(q, k, v, asked.window, asked.scaling)
            out.sum().backward()
        assert (out.shape, out.dtype) == ((1, 8, asked.heads, 8), torch.bfloat16)
        assert [t.grad.shape for t in (q, k, v)] == [t.shape for t in (q, k, v)]


# Which kernel a model gets


@cache
def asked_by(name):
    return kernels._asked(packable(name))


def test_what_the_layers_of_a_model_ask_for_is_heard():
    scale = 8**-0.5
    assert asked_by("llama") == [Asked(4, 2, 8, 8, None, scale)]
    assert asked_by("mistral with a window") == [Asked(4, 2, 8, 8, 4, scale)]
    assert {(each.window, each.scaling) for each in asked_by("gemma3 with a window")} == {
        (4, 256**-0.5),
        (None, 256**-0.5),
    }
    assert asked_by("granite") == [Asked(4, 2, 8, 8, None, 0.7)]
    assert asked_by("gpt2") == [Asked(4, 4, 8, 8, None, scale)]


def wrong(name):
    """Kernels that are nearly right."""

    def kernel(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale, window_size, enable_gqa):
        lengths = cu_seq_q, cu_seq_k, max_q, max_k
        if name == "fails":
            raise RuntimeError("no kernel for\nthis device")
        if name == "a wider window" and window_size[0] > 0:
            window_size = (window_size[0] + 1, 0)
        if name == "no window":
            window_size = (-1, window_size[1])
        if name == "sees the next token":
            window_size = (window_size[0], 1)
        if name == "another scale":
            scale *= 1.05
        if name == "the scale of its own":
            scale = None
        if name == "heads in turn":
            shared = query.shape[1] // key.shape[1]
            query = query.unflatten(1, (shared, -1)).transpose(1, 2).flatten(1, 2)
        if name == "top left":
            firsts = zip(cu_seq_q.diff().tolist(), cu_seq_k[:-1].tolist(), strict=True)
            keep = torch.cat([torch.arange(first, first + count) for count, first in firsts])
            key, value, lengths = key[keep], value[keep], (cu_seq_q, cu_seq_q, max_q, max_q)
        if name == "no gradient of keys":
            key = key.detach() + 0 * key
        if name == "half the gradient of values":
            value = (value + value.detach()) / 2
        out = varlen_reference(query, key, value, *lengths, scale=scale, window_size=window_size, enable_gqa=enable_gqa)
        if name == "not a number":
            out = out * torch.nan
        if name == "other values with gradients":
            out = out * (1 + 2**-7 * out.requires_grad)
        return out

    return kernel


REFUSED = {
    "llama": {
        "fails": "RuntimeError: no kernel for",
        "sees the next token": "off by",
        "another scale": "off by",
        "heads in turn": "off by",
        "top left": "off by",
        "no gradient of keys": "off by 1",
        "half the gradient of values": "off by 0.5",
        "not a number": "off by inf",
        "other values with gradients": "other values with gradients than without",
    },
    "mistral with a window": {"a wider window": "off by", "no window": "off by"},
    "gemma3 with a window": {"a wider window": "off by", "no window": "off by", "the scale of its own": "off by"},
    "granite": {"the scale of its own": "off by"},
}


@pytest.mark.parametrize(("name", "slip"), [(name, slip) for name, slips in REFUSED.items() for slip in slips])
def test_a_kernel_that_is_nearly_right_is_refused_with_a_reason(name, slip):

    reasons = [kernels._difference(wrong(slip), each, CPU) for each in asked_by(name)]
    assert any(reason and reason.startswith(REFUSED[name][slip]) for reason in reasons), reasons


@pytest.mark.parametrize("name", MODELS)
def test_the_right_kernel_is_taken_whatever_the_model(name):
    model = tiny(MODELS[name])
    way = choose_way(model)
    chosen = choose_kernel(model, way, [wrong("fails"), varlen_reference, wrong("nothing")])
    assert chosen.kernel is varlen_reference
    assert (chosen.notes, chosen) == (way.notes, way)


def test_a_slip_that_a_model_never_meets_is_none():
    model = tiny(MODELS["llama"])
    way = choose_way(model)
    for slip in ("no window", "the scale of its own"):
        assert choose_kernel(model, way, [wrong(slip)]).kernel is not None


def test_without_a_kernel_there_are_buckets_and_a_line():
    model = tiny(MODELS["llama"])
    way = choose_way(model)
    for tried, said in ([wrong("fails")], "RuntimeError: no kernel for"), ([], "the installed torch has none"):
        chosen = choose_kernel(model, way, tried)
        assert chosen.scorer(model, 1.0).layout == Packing.of
        (note,) = chosen.notes
        assert said in note
        assert "\n" not in note
    assert choose_kernel(model, way, None) is way
    padded = Way("sdpa", None)
    assert choose_kernel(model, padded, [varlen_reference]) is padded


def test_kernels_are_for_16_bits_on_a_gpu():
    assert kernels_for(torch.device("cuda"), True) == installed_kernels() != ()
    assert kernels_for(torch.device("cuda"), False) is None
    assert kernels_for(CPU, True) is None


def test_a_policy_is_loaded_with_the_kernel_that_its_device_has(monkeypatch):
    calls = []

    def counting(*arguments, **options):
        calls.append(options)
        return varlen_reference(*arguments, **options)

    monkeypatch.setattr(load, "kernels_for", lambda device, half: [counting] if half else None)
    loaded = load.load_policy(model_config("model.device=cpu", "model.dtype=bfloat16"))
    assert loaded.way.kernel is counting
    assert loaded.way.facts()["varlen"]
    again = Way.stored(loaded.way.facts())
    assert (again, again.kernel) == (loaded.way, None)
    # What is tried before a run is float32 with the same way, and no kernel's matter.
    calls.clear()
    batch = ragged_batch()
    truth = Scorer(loaded.model, 1.0, packed=True)(batch)[0]
    assert torch.equal(loaded.way.scorer(loaded.model, 1.0)(batch)[0], truth)
    assert calls == []
    loaded.narrow()
    loaded.way.scorer(loaded.model, 1.0, half=True)(batch)
    assert len(calls) == loaded.model.config.num_hidden_layers
    whole = load.load_policy(model_config("model.device=cpu", "model.dtype=float32"))
    assert whole.way.kernel is None
    assert not whole.way.facts()["varlen"]
