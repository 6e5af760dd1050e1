"""The model that is named is the model that trains.

What transformers calls a model is its eager attention, in float32, one row at a time and without a cache. Whatever is
faster (sdpa, rows padded to one length, packed rows, grouped experts) may be another model: sdpa knows no soft cap. So
the fastest way whose log-probabilities are the model's own is found by trying, on a few made-up rows, before anything
is made. Nothing is asked of a model's name.
"""

import copy
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from kpo_cli.errors import UserError
from kpo_cli.policy.attention import NAME, Lacking, Packing
from kpo_cli.policy.batch import Batch, make_batch
from kpo_cli.policy.response import Response
from kpo_cli.policy.scorer import Scorer
from kpo_cli.policy.varlen import Kernel, Segments

PACKABLE_LAYERS = {"full_attention", "sliding_attention"}
TOLERANCE = 1e-4
"""Between log-probs, nats. Where float32 rounds by more, as in a deep model, float64 has to decide."""
ROUNDING = 10
"""One float32 rounds by at most so many times what another does."""
PROBE_WINDOW = 4
"""Of rows of 7 to 12 tokens."""
SMALL = 5_000_000
"""Parameters of a model that is copied, to be tried with other weights besides its own."""
MARKED = ("_token_id", "_index", "_idx")
"""What a configuration calls a token ends so."""
PLAIN_MARKS = ("bos", "eos", "sep", "decoder")
"""Tokens that every configuration of transformers may name."""
BOTTOM = 8
"""Of the parameters, so many of the first are of the first layer, or below it."""
AS_BEFORE = "as before"
STORED = ("attention", "experts", "packed", "alone")
"""Of a way, in a manifest."""
WINDOWS = ("sliding_window", "attention_window_size", "attention_chunk_size")
"""What models call the number of tokens that they look back."""


@dataclass(frozen=True)
class Way:
    """How a model's log-probabilities are computed."""

    attention: str
    """As transformers names it."""
    experts: str | None = None
    """None: the model has no experts, or one way with them."""
    packed: bool = False
    alone: bool = False
    """One row at a time."""
    kernel: Kernel | None = field(default=None, compare=False)
    """Of varlen attention, for packed rows in 16 bits (`policy/kernels.py`); None: buckets."""
    unpacked_because: str | None = field(default=None, compare=False)
    notes: tuple[str, ...] = field(default=(), compare=False)
    """What the user should know of the way: that it is slow, and why it has to be."""

    @classmethod
    def stored(cls, facts: dict[str, Any]) -> "Way":
        """From a manifest's `facts`. Kernels are tried anew: they belong to a device."""
        return cls(**{name: value for name, value in facts.items() if name != "varlen"})

    def facts(self) -> dict[str, Any]:
        """For the manifest: what a resumed run has to find again, and whether varlen attention was there."""
        told = {name: value for name, value in asdict(self).items() if name in STORED}
        return told | {"varlen": self.kernel is not None}

    def scorer(self, model: Any, temperature: float, half: bool = False) -> Scorer:
        layout = Packing.of if self.kernel is None else partial(Segments.of, kernel=self.kernel)
        return Scorer(model, temperature, half, self.packed, self.alone, layout)

    def __str__(self) -> str:
        rows = "packed" if self.packed else "one row at a time" if self.alone else "padded"
        attention = "sdpa" if self.attention == NAME else self.attention
        experts = f", {self.experts} experts" if self.experts not in (None, "eager") else ""
        return f"{attention} attention, {rows}{experts}"


@torch.no_grad()
def choose_way(model: Any, before: Way | None = None) -> Way:
    """Set a model (in float32, in eval mode) to the fastest way that computes what it is.

    `before` is the way of a run that goes on with it: that is taken even a little outside of the tolerance, since with
    another one the numbers would change in the middle of the run. Raises UserError if there is no way.
    """
    own = Way(_attention(model), model.config._experts_implementation)
    with short_windows(model):
        trials = [_Trial(model), *_with_weights_drawn(model)]
        wrong: dict[Way, str] = {}
        for way in _ways(model, own, before):
            tolerance = ROUNDING * TOLERANCE if way == before else TOLERANCE
            reasons = (trial.difference(way, tolerance) for trial in trials)
            reason = next((reason for reason in reasons if reason is not None), None)
            if reason is None:
                break
            wrong[way] = reason
        else:
            raise UserError(f"model.path={model.name_or_path}: {_no_way(wrong)}")
    _use(model, way)
    packed = replace(own, attention=NAME, packed=True)
    because = None if way.packed else _unpackable(model, own) or wrong.get(packed, AS_BEFORE)
    return replace(way, unpacked_because=because, notes=_notes(own, way, before, wrong))


def _ways(model: Any, own: Way, before: Way | None) -> Iterator[Way]:
    """Those that there are, each faster than the next."""
    if before is not None:
        yield before
    for experts in dict.fromkeys([own.experts, own.experts and "eager"]):
        if _unpackable(model, own) is None:
            yield Way(NAME, experts, packed=True)
        for attention in dict.fromkeys([own.attention, "eager"]):
            yield Way(attention, experts)
        yield Way("eager", experts, alone=True)


def _unpackable(model: Any, own: Way) -> str | None:
    """A reason why packing need not be tried."""
    if own.attention != "sdpa":
        return f"its attention is {own.attention}"
    if other := set(getattr(model.config.get_text_config(), "layer_types", None) or ()) - PACKABLE_LAYERS:
        return f"it has layers of {', '.join(sorted(other))}"
    head = model.get_output_embeddings()
    if type(head) is not torch.nn.Linear or head._forward_hooks or head._forward_pre_hooks:
        return f"its head is not a plain linear layer ({type(head).__name__})"
    return None


def _notes(own: Way, way: Way, before: Way | None, wrong: dict[Way, str]) -> tuple[str, ...]:
    """What is slower than transformers would have it, and why; padding is said by whoever pads."""
    notes = []
    if before not in (None, way):
        notes.append(f"warning: log-probabilities are computed by {way} from here on, by {before} before")
    if way.attention == "eager" != own.attention:
        reason = wrong.get(replace(own, experts=way.experts), AS_BEFORE)
        notes.append(
            f"warning: attention is eager, not {own.attention} ({reason}): slower, and every head of a layer holds a "
            f"score for any two tokens of a row"
        )
    if way.experts != own.experts:
        reason = wrong.get(replace(way, experts=own.experts), AS_BEFORE)
        notes.append(f"warning: experts are computed one by one, not as {own.experts} ({reason}): slower")
    if way.alone:
        reason = wrong.get(replace(way, alone=False), AS_BEFORE)
        notes.append(f"warning: each response is a micro-batch of its own, not padded beside others ({reason}): slower")
    return tuple(notes)


def _no_way(wrong: dict[Way, str]) -> str:
    tried = "; ".join(f"{way}: {reason}" for way, reason in wrong.items())
    return (
        f"kpo has no way to compute this model's log-probabilities as its eager attention does, one row at a time "
        f"({tried}); take another architecture"
    )


class _Trial:
    """A model, a few rows, and their log-probabilities as they ought to be."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.batch = _probe(model.config.get_text_config().vocab_size, marks_of(model))
        self.wide_truth: Tensor | None = None
        self.lacking: str | None = None
        learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.lowest = sorted(learned[:BOTTOM], key=lambda parameter: parameter.numel())
        try:
            self.truth = plain_log_probs(model, self.batch)
        except Exception as error:  # a stranger's model code may raise anything
            raise UserError(
                f"model.path={model.name_or_path}: its forward pass fails on a plain row of tokens "
                f"({_in_a_line(error)}); take another architecture"
            ) from None
        if self.truth.isnan().any():
            raise UserError(
                f"model.path={model.name_or_path}: its log-probabilities are NaN, so its weights are damaged, or too "
                f"large for float32; take others"
            )

    def difference(self, way: Way, tolerance: float) -> str | None:
        """Why a way is not the model; None if it is, where gradients are computed as well."""
        if self.lacking and way.attention in ("sdpa", NAME):
            return self.lacking
        try:
            gap = self._gap(way, self.truth)
            allowed = tolerance if gap < tolerance else self._rounding(way, gap, tolerance)
            if gap < allowed:
                with torch.enable_grad():
                    gap = self._gap(way, self.truth, backward=True)
            return None if gap < allowed else f"log-probabilities differ by {gap:.2g}"
        except Lacking as error:
            self.lacking = str(error)
            return self.lacking
        except Exception as error:  # a stranger's model code may raise anything
            return _in_a_line(error)

    def _rounding(self, way: Way, gap: float, tolerance: float) -> float:
        """What a way may differ by in float32, where it does by `gap`, if it is the model in float64; else 0."""
        # A grouped product has no float64: then experts one by one, which round in float32 about as it does.
        single = replace(way, experts=way.experts and "eager")
        wide = torch.inf
        with suppress(Exception), in_float64(self.model), WideSoftmax():
            if self.wide_truth is None:
                self.wide_truth = plain_log_probs(self.model, self.batch)
            wide = self._gap(single, self.wide_truth)
        if wide < tolerance:
            return ROUNDING * (gap if single == way else self._gap(single, self.truth))
        return 0.0

    def _gap(self, way: Way, truth: Tensor, backward: bool = False) -> float:
        """The largest difference of a log-probability; `backward`: gradients reach the bottom as well, or it raises."""
        _use(self.model, way)
        scorer, mask = way.scorer(self.model, 1.0), self.batch.response_mask
        values = torch.zeros_like(truth)
        for rows in scorer.split(self.batch, torch.arange(len(mask)), mask.numel() * len(mask)):
            part = self.batch.rows(rows)
            log_probs = scorer(part)[0]
            if backward:
                self._backward(log_probs.sum())
            values[rows, : part.response_mask.shape[1]] = log_probs.detach().to(truth)
        gaps = torch.where(values == truth, 0.0, (values - truth).abs())[mask.to(truth.device)]
        return float(gaps.nan_to_num(torch.inf).max())

    def _backward(self, total: Tensor) -> None:
        """To the small ones of the lowest parameters, so that little is held; to all, where none has a part in it.

        A frozen model has none."""
        if not self.lowest:
            return
        few = torch.autograd.grad(total, self.lowest[: BOTTOM // 2], allow_unused=True, retain_graph=True)
        if all(gradient is None for gradient in few):
            torch.autograd.grad(total, self.lowest, allow_unused=True)


@torch.no_grad()
def plain_log_probs(model: Any, batch: Batch) -> Tensor:
    """What a model says of the responses of a batch at temperature 1, (N, T), zero outside the mask, on its device."""
    values = torch.zeros(batch.response_ids.shape, device=model.device)
    rows = zip(batch.prompt_lengths.tolist(), batch.response_mask.sum(-1).tolist(), strict=True)
    for row, (prompt, length) in enumerate(rows):
        ids = torch.cat([batch.prompt_ids[row, :prompt], batch.response_ids[row, :length]]).to(model.device)
        log_probs = plain_logits(model, ids)[prompt - 1 : -1].float().log_softmax(-1)
        values[row, :length] = log_probs.gather(-1, ids[prompt:, None]).squeeze(-1)
    return values


def plain_logits(model: Any, ids: Tensor) -> Tensor:
    """(L, V) behind each token (L,) of a row: eager attention, experts one by one, no mask, no cache, nothing of ours.

    The model is left with that attention and those experts.
    """
    _use(model, Way("eager", model.config._experts_implementation and "eager"))
    logits: Tensor = model(input_ids=ids[None], use_cache=False).logits[0]
    return logits


def _in_a_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def _attention(model: Any) -> str:
    """What transformers chose for a model."""
    name: str = model.config._attn_implementation
    return "sdpa" if name == NAME else name


def _use(model: Any, way: Way) -> None:
    model.set_attn_implementation(way.attention)
    if model.config._attn_implementation != way.attention:  # Falcon, which reads its configuration in every pass
        model.config._attn_implementation = way.attention
    if way.experts is not None:
        model.set_experts_implementation(way.experts)


def _with_weights_drawn(model: Any) -> list[_Trial]:
    """A trial of a copy with other weights, where a model is small.

    With those of a model that is fresh a difference might be too small to see, and grow as it learns.
    """
    if model.num_parameters() > SMALL:
        return []
    other = copy.deepcopy(model)
    draw = torch.Generator().manual_seed(0)
    for parameter in filter(torch.is_floating_point, other.parameters()):
        spread_out = torch.randn(parameter.shape, generator=draw)
        parameter.copy_(1 + 0.3 * spread_out if parameter.dim() == 1 else 1.5 * spread_out / parameter.shape[-1] ** 0.5)
    with suppress(UserError):  # NaN, with such weights
        return [_Trial(other)]
    return []


@contextmanager
def in_float64(model: Any) -> Iterator[None]:
    """Within the block the model computes in float64, with no more than one layer and the head copied at a time.

    What it rounds to float32 by itself, as in its norms, it rounds both ways alike.
    """
    narrow: dict[torch.nn.Parameter, Tensor] = {}
    head = list(model.get_output_embeddings().parameters())  # read from outside its forward pass

    def widen(parameters: Iterable[torch.nn.Parameter]) -> None:
        for parameter in parameters:
            if parameter.dtype == torch.float32:
                narrow[parameter] = parameter.data
                parameter.data = parameter.data.double()

    def restore(parameters: Iterable[torch.nn.Parameter]) -> None:
        for parameter in parameters:
            if parameter in narrow:
                parameter.data = narrow.pop(parameter)

    handles = []
    experts = model.config._experts_implementation
    for module, own in _units(model):
        passing = [parameter for parameter in own if not any(parameter is other for other in head)]
        handles.append(module.register_forward_pre_hook(lambda *_, own=passing: widen(own)))
        handles.append(module.register_forward_hook(lambda *_, own=passing: restore(own)))
    try:
        if experts is not None:
            model.set_experts_implementation("eager")  # a grouped product has no float64
        widen(head)
        yield
    finally:
        if experts is not None:
            model.set_experts_implementation(experts)
        for handle in handles:
            handle.remove()
        restore(list(narrow))


class WideSoftmax(TorchFunctionMode):
    """Within the block what is float64 stays so in a softmax: that of eager attention asks for float32."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.nn.functional.softmax and args[0].dtype == torch.float64:
            kwargs = {**kwargs, "dtype": None}
        return func(*args, **kwargs)


def _units(module: torch.nn.Module) -> Iterator[tuple[torch.nn.Module, list[torch.nn.Parameter]]]:
    """The layers of a model, each with all of its parameters, and what stands around them with its own."""
    yield module, list(module.parameters(recurse=False))
    for child in module.children():
        if isinstance(child, torch.nn.ModuleList):
            yield from ((layer, list(layer.parameters())) for layer in child)
        else:
            yield from _units(child)


@contextmanager
def short_windows(model: Any) -> Iterator[None]:
    """Within the block sliding windows are so short that the probe sees them act: some layers have theirs in the
    mask alone, which packed attention does not read."""
    holders = [*model.modules(), model.config.get_text_config()]
    named = [(holder, name, getattr(holder, name, None)) for holder in holders for name in WINDOWS]
    own = [(holder, name, window) for holder, name, window in named if type(window) is int]
    for holder, name, window in own:
        setattr(holder, name, min(window, PROBE_WINDOW))
    try:
        yield
    finally:
        for holder, name, window in own:
            setattr(holder, name, window)


@torch.no_grad()
def marks_of(model: Any) -> list[int]:
    """Tokens that a model may treat in a way of its own: Gemma 4 embeds those that stand for an image as padding,
    outside of its decoder; RoBERTa counts positions without those of padding, and XLM a text's length.

    None, where it cannot read them in a text: some insist on the image that a mark stands for.
    """
    config, rows = model.config, model.config.get_text_config().vocab_size
    named = ((name, value) for name, value in config.to_dict().items() if name.endswith(MARKED))
    marks = {value for name, value in named if isinstance(value, int) and name.split("_")[0] not in PLAIN_MARKS}
    tables = (module for module in model.modules() if isinstance(module, torch.nn.Embedding))
    marks |= {table.padding_idx for table in tables if table.padding_idx is not None and table.num_embeddings == rows}
    found = sorted(mark for mark in marks if 0 <= mark < rows)
    try:
        type(model).forward(model, input_ids=torch.tensor([[0, *found, 0]], device=model.device), use_cache=False)
    except Exception:  # a stranger's model code may raise anything
        return []
    return found


def _probe(vocabulary: int, marks: Sequence[int] = ()) -> Batch:
    """Two prompts with two responses each, of different lengths, of tokens spread over the vocabulary, and `marks`
    twice: what looks ahead for them is seen in front of one."""
    draw = torch.Generator().manual_seed(0)

    def tokens(count: int) -> list[int]:
        return torch.randint(vocabulary, (count,), generator=draw).tolist()

    drawn = [[tokens(count) for count in counts] for counts in ((4, 9), (7, 2))]
    drawn[0][1][2:2] = [*marks, *marks]
    groups = [[Response(ids, [0.0] * len(ids), True) for ids in group] for group in drawn]
    return make_batch([tokens(3), tokens(5)], groups, torch.zeros(4), torch.zeros(4))
