"""`linear_log_probs` against float64 arithmetic on whole logits, in value and gradient, and what it holds in memory."""

import threading

import pytest
import torch
from torch.nn.functional import linear
from torch.utils._python_dispatch import TorchDispatchMode

from kpo_cli.core import linear_log_probs, log_probs, token_log_probs


def inputs(tokens, width, vocabulary, with_bias=False, dtype=torch.float32, seed=0):
    """hidden, weight, bias (or None) and token_ids; logits have a standard deviation of 2."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, width, generator=generator, dtype=dtype)
    weight = 2 * width**-0.5 * torch.randn(vocabulary, width, generator=generator, dtype=dtype)
    bias = torch.randn(vocabulary, generator=generator, dtype=dtype) if with_bias else None
    ids = torch.randint(0, vocabulary, (tokens,), generator=generator)
    return hidden, weight, bias, ids


def truth(hidden, weight, bias, ids, temperature):
    """In float64 and by the definition: p = exp(logit) / sum exp(logit), H = -sum p log p with 0 log 0 = 0."""
    hidden, weight = hidden.double(), weight.double()
    logits = hidden @ weight.T if bias is None else hidden @ weight.T + bias.double()
    scaled = logits / temperature
    scaled = scaled - scaled.detach().max(-1, keepdim=True).values
    total = scaled.exp().sum(-1, keepdim=True)
    p = scaled.exp() / total
    chosen = scaled[torch.arange(len(ids)), ids] - total[:, 0].log()
    return chosen, torch.special.entr(p).sum(-1)


def weighted(chosen, entropy, entropy_gradient):
    """A scalar that gives every token another gradient."""
    upstream = torch.linspace(-1, 2, len(chosen), dtype=chosen.dtype)
    loss = (chosen * upstream).sum()
    return loss + (entropy * upstream.flip(0)).sum() if entropy_gradient else loss


def gradients(compute, tensors, entropy_gradient, **keywords):
    """Values, and gradients of hidden, weight and bias (where there is one)."""
    leaves = [None if t is None else t.clone().requires_grad_() for t in tensors]
    chosen, entropy = compute(*leaves, **keywords)
    found = torch.autograd.grad(weighted(chosen, entropy, entropy_gradient), [t for t in leaves if t is not None])
    return [chosen.detach(), entropy.detach(), *found]


def chunked(hidden, weight, bias, ids, temperature, **keywords):
    return linear_log_probs(hidden, weight, ids, temperature, bias=bias, **keywords)


def assert_close(found, wanted, tolerance=1e-5):
    """Relative to the largest of each tensor."""
    for got, want in zip(found, wanted, strict=True):
        assert got.shape == want.shape
        assert float((got.double() - want.double()).abs().max()) <= tolerance * float(want.abs().max())


@pytest.fixture(params=["kept", "computed again"])
def memory(request, monkeypatch):
    """Both ways to come by the probabilities in the backward pass."""
    if request.param == "computed again":
        monkeypatch.setattr(log_probs, "KEPT_LOGITS", 0)


@pytest.mark.parametrize("entropy_gradient", [False, True])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize(
    ("tokens", "width", "vocabulary", "chunk", "temperature"),
    [
        (1, 4, 30, None, 1.0),
        (37, 16, 258, 10, 0.7),
        (64, 33, 1000, 64, 1.0),
        (50, 8, 17, 7, 1.5),
        (5, 256, 5000, 1, 1.0),
    ],
)
def test_values_and_gradients(memory, tokens, width, vocabulary, chunk, temperature, with_bias, entropy_gradient):
    *tensors, ids = inputs(tokens, width, vocabulary, with_bias)
    found = gradients(
        lambda h, w, b: chunked(h, w, b, ids, temperature, chunk=chunk, entropy_gradient=entropy_gradient),
        tensors,
        entropy_gradient,
    )
    assert {t.dtype for t in found} == {torch.float32}
    wanted = gradients(
        lambda h, w, b: truth(h, w, b, ids, temperature),
        [None if t is None else t.double() for t in tensors],
        entropy_gradient,
    )
    assert_close(found, wanted)


def test_the_plain_path_says_the_same(memory):
    hidden, weight, _, ids = inputs(37, 64, 258)
    plain = gradients(lambda h, w: token_log_probs(linear(h, w), ids, 0.9, True), [hidden, weight], True)
    found = gradients(
        lambda h, w: linear_log_probs(h, w, ids, 0.9, entropy_gradient=True, chunk=8), [hidden, weight], True
    )
    assert_close(found, plain)


def test_sharp_distributions_keep_their_digits(memory):
    """Logits of hundreds, exact in float32: probabilities underflow, log-probabilities do not."""
    hidden, weight, _, ids = inputs(40, 16, 300)
    hidden, weight = (t.mul(8).round().div(8) for t in (hidden, weight))
    found = gradients(lambda h, w: linear_log_probs(h, w, ids, 2**-6, chunk=16), [hidden, weight], False)
    wanted = gradients(lambda h, w: truth(h, w, None, ids, 2**-6), [hidden.double(), weight.double()], False)
    assert float(wanted[0].min()) < -200
    assert_close(found, wanted)


@pytest.mark.parametrize("with_bias", [False, True])
def test_gradcheck(memory, with_bias):
    hidden, weight, bias, ids = inputs(7, 5, 11, with_bias, torch.float64)
    leaves = [t.requires_grad_() for t in (hidden, weight, bias) if t is not None]

    def compute(h, w, b=None):
        return linear_log_probs(h, w, ids, 0.8, bias=b, entropy_gradient=True, chunk=3)

    assert compute(*leaves)[0].dtype == torch.float64
    assert torch.autograd.gradcheck(compute, leaves)


@pytest.mark.parametrize("entropy_gradient", [False, True])
def test_impossible_tokens(memory, entropy_gradient):
    hidden, weight, bias, ids = inputs(20, 8, 30, True)
    bias[10:] = -torch.inf
    ids = ids % 10
    found = gradients(
        lambda h, w, b: chunked(h, w, b, ids, 0.7, chunk=6, entropy_gradient=entropy_gradient),
        [hidden, weight, bias],
        entropy_gradient,
    )
    wanted = gradients(lambda h, w, b: truth(h, w, b, ids, 0.7), [hidden, weight[:10], bias[:10]], entropy_gradient)
    assert_close(found[:3], wanted[:3])
    assert_close([g[:10] for g in found[3:]], wanted[3:])
    assert all(bool((g[10:] == 0).all()) for g in found[3:])
    ids[3] = 20
    chosen, entropy = chunked(hidden, weight, bias, ids, 0.7)
    assert chosen[3] == -torch.inf
    assert entropy.isfinite().all()


@pytest.mark.parametrize("cast", ["autocast", "autocast, half hidden", "inputs"])
def test_bfloat16_as_in_a_head(memory, cast):
    """Logits are the head's own bfloat16 numbers; the rest is float32, also the sum of the weight's gradient."""
    hidden, weight, _, ids = inputs(60, 32, 100)
    hidden = hidden if cast == "autocast" else hidden.bfloat16()
    weight = weight.bfloat16() if cast == "inputs" else weight
    with torch.autocast("cpu", torch.bfloat16, enabled=cast != "inputs"):
        logits = linear(hidden, weight)
        plain = gradients(lambda h, w: token_log_probs(linear(h, w), ids, 0.7, True), [hidden, weight], True)
        found = gradients(
            lambda h, w: linear_log_probs(h, w, ids, 0.7, entropy_gradient=True, chunk=16), [hidden, weight], True
        )
    assert logits.dtype == torch.bfloat16
    assert [t.dtype for t in found] == [torch.float32, torch.float32, hidden.dtype, weight.dtype]
    leaf = logits.detach().double().requires_grad_()
    exact = torch.autograd.grad(weighted(*truth(leaf, torch.eye(100), None, ids, 0.7), True), leaf)[0]
    wanted = exact @ weight.bfloat16().double(), exact.T @ hidden.bfloat16().double()
    assert_close(found[:2], plain[:2], 1e-6)
    assert_close(found[2:], wanted, 2**-7)
    error, plain_error = (float((t[3].double() - wanted[1]).abs().max()) for t in (found, plain))
    assert error < 0.6 * plain_error if cast != "inputs" else error < 1.1 * plain_error


@pytest.mark.parametrize("frozen", ["weight", "hidden"])
def test_a_frozen_part_gets_nothing_and_costs_nothing(frozen):
    hidden, weight, _, ids = inputs(20, 8, 30)
    wanted = gradients(lambda h, w: linear_log_probs(h, w, ids, 1.0, chunk=6), [hidden, weight], False)
    (hidden if frozen == "weight" else weight).requires_grad_()
    loss = weighted(*linear_log_probs(hidden, weight, ids, 1.0, chunk=6), False)
    with Largest() as seen:
        loss.backward()
    assert torch.equal(hidden.grad, wanted[2]) if frozen == "weight" else hidden.grad is None
    assert torch.equal(weight.grad, wanted[3]) if frozen == "hidden" else weight.grad is None
    assert seen.shapes.isdisjoint({weight.shape} if frozen == "weight" else {hidden.shape})


def test_tied_embeddings_get_both_gradients():
    _, weight, _, ids = inputs(20, 8, 30)
    weight.requires_grad_()
    for compute in (
        lambda h: linear_log_probs(h, weight, ids, 1.0, chunk=6),
        lambda h: token_log_probs(linear(h, weight), ids, 1.0),
    ):
        weighted(*compute(weight[ids].tanh()), False).backward()
    chunked_once = torch.autograd.grad(
        weighted(*linear_log_probs(weight[ids].tanh(), weight, ids, 1.0, chunk=6), False), weight
    )
    assert_close([weight.grad], [2 * chunked_once[0]])


def test_no_gradient_asked_for():
    hidden, weight, _, ids = inputs(20, 8, 30)
    chosen, entropy = linear_log_probs(hidden, weight.requires_grad_(), ids, 1.0)
    assert chosen.requires_grad
    assert not entropy.requires_grad
    with torch.no_grad():
        without = linear_log_probs(hidden, weight, ids, 1.0)
    assert not without[0].requires_grad
    assert torch.equal(without[0], chosen)
    assert torch.equal(without[1], entropy)


def test_no_tokens():
    hidden, weight, _, ids = inputs(0, 8, 30)
    hidden.requires_grad_(), weight.requires_grad_()
    chosen, entropy = linear_log_probs(hidden, weight, ids, 1.0)
    chosen.sum().backward()
    assert chosen.shape == entropy.shape == (0,)
    assert hidden.grad.shape == (0, 8)
    assert bool((weight.grad == 0).all())


def test_two_threads_at_once(memory):
    """Each with its own tokens, and a weight in common."""
    _, weight, _, _ = inputs(1, 16, 500)
    results = {}

    def work(seed):
        hidden, _, _, ids = inputs(300, 16, 500, seed=seed)
        results[seed] = [
            gradients(
                lambda h, w: linear_log_probs(h, w, ids, 0.9, entropy_gradient=True, chunk=32), [hidden, weight], True
            )
            for _ in range(5)
        ]

    alone = {}
    for seed in (1, 2):
        work(seed)
        alone[seed] = results.pop(seed)[0]
    threads = [threading.Thread(target=work, args=(seed,)) for seed in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for seed in (1, 2):
        for found in results[seed]:
            assert all(torch.equal(got, want) for got, want in zip(found, alone[seed], strict=True))


class Largest(TorchDispatchMode):
    """The elements of the largest tensor that any operation returned, and all shapes that were seen."""

    def __init__(self):
        super().__init__()
        self.numel, self.shapes = 0, set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, torch.Tensor):
                self.numel = max(self.numel, tensor.untyped_storage().nbytes() // tensor.element_size())
                self.shapes.add(tensor.shape)
        return out


@pytest.mark.parametrize("entropy_gradient", [False, True])
def test_nothing_larger_than_a_chunk_of_logits(monkeypatch, entropy_gradient):
    monkeypatch.setattr(log_probs, "KEPT_LOGITS", 0)
    tokens, vocabulary, chunk = 200, 1000, 16
    hidden, weight, bias, ids = inputs(tokens, 4, vocabulary, with_bias=True)
    leaves = [t.requires_grad_() for t in (hidden, weight, bias)]
    with Largest() as seen:
        weighted(
            *chunked(*leaves, ids, 0.9, chunk=chunk, entropy_gradient=entropy_gradient), entropy_gradient
        ).backward()
    assert seen.numel == chunk * vocabulary
    with Largest() as seen:
        weighted(*token_log_probs(linear(*leaves), ids, 0.9, entropy_gradient), entropy_gradient).backward()
    assert seen.numel == tokens * vocabulary


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"hidden": torch.zeros(3, 4, 8)},
            "hidden has shape (3, 4, 8) and weight (30, 8); they must be (N, D) and (V, D)",
        ),
        ({"weight": torch.zeros(30, 9)}, "hidden has shape (20, 8) and weight (30, 9); they must be (N, D) and (V, D)"),
        ({"token_ids": torch.zeros(19, dtype=torch.long)}, "token_ids has shape (19,) but hidden has (20, 8)"),
        ({"bias": torch.zeros(8)}, "bias has shape (8,) but weight has (30, 8)"),
        ({"weight": torch.zeros(30, 8).bfloat16()}, "hidden has dtype torch.float32 but weight has torch.bfloat16"),
    ],
)
def test_what_does_not_fit_is_named(change, message):
    hidden, weight, _, ids = inputs(20, 8, 30)
    given = {"hidden": hidden, "weight": weight, "token_ids": ids, "temperature": 1.0} | change
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the whole message is compared below
        linear_log_probs(**given)
    assert str(caught.value) == message
