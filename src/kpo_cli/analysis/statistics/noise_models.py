"""Which noise the raw log-ratios look like, and whether a drift along the response is beside it.

The likelihood of steps that were not fitted compares models on equal terms: each is fitted on every second recorded
step (of one step alone: on every second prompt) and judged on the others, mean nats per token, higher is better.

Whether there is a drift is not decided by likelihood: what a model lacks in the sizes of log-ratios, a walk can make up
for. The test (`prediction`, kpo_cli.analysis.statistics.order) asks whether the past predicts the sign and size of what
comes next. There is a drift where it does so better than in 95% of the draws of either null, with and without what the
places of all responses have in common: each rival (independent noise of any sizes, a shift of a whole response, a
pattern of places) keeps one of these four at its level, so that all four together err in at most 5%. The rival that
remains, noise that hangs together over a few tokens, is one of likelihood: `memory`.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from kpo_cli.analysis.statistics.family import LEVEL
from kpo_cli.analysis.statistics.likelihood import Fit, Likelihood, clusters_of
from kpo_cli.analysis.statistics.nulls import Nulls
from kpo_cli.core import noise
from kpo_cli.runs.ratios import Ratios


def drift(
    batch: Ratios, nulls: Nulls | None, held: dict[str, Any] | None, memory: dict[str, Any] | None
) -> dict[str, Any] | None:
    """The most likely walk and noise, and the verdict; None if z is all 0."""
    fit = Likelihood(batch).walk(shaped=True)
    if fit is None:
        return None
    z = 1.959964 * fit.log_q_error
    known = fit.q > 0 and z < math.log(100)
    found: dict[str, Any] = {
        "q": fit.q,
        "v": fit.v,
        "gamma": fit.shape.gamma,
        "constant": fit.shape.constant,
        "q_interval": [fit.q * math.exp(-z), fit.q * math.exp(z)] if known else None,
        "log_q_error": _finite(fit.log_q_error),
        "log_v_error": _finite(fit.log_v_error),
        "log_q_over_v_error": _finite(fit.log_q_over_v_error),
        "on_floor": fit.q == 0,
        "tokens": int(batch.mask.sum()),
        "responses": len(batch),
        "moved": math.sqrt(fit.q * float(batch.lengths.mean())),
        "time_constant": _time_constant(fit, batch) if fit.q else None,
    }
    return found | _verdict(found, nulls, held, memory)


def _verdict(
    fit: dict[str, Any], nulls: Nulls | None, held: dict[str, Any] | None, memory: dict[str, Any] | None
) -> dict[str, Any]:
    """`verdict`: "drift", "fades", "no drift seen", or "not determined" with what speaks against; p-values by name
    and null.
    """
    if nulls is None:
        return {"verdict": "not determined", "against": ["there is no null"], "p_values": None}
    p = {name: dict(by_null) for name, by_null in nulls.prediction_p.items()}
    shuffled, flipped = (p["prediction"][kind] <= LEVEL for kind in ("null_shuffled", "null_sign_flipped"))
    if not shuffled and not flipped:
        refutable = all(family.refutable for family in nulls.families.values())
        verdict = "no drift seen" if refutable else "not determined"
        return {"verdict": verdict, "against": [] if refutable else ["there are too few tokens"], "p_values": p}
    inside = max(p["prediction_within_places"].values())
    models = held["models"] if held else {}
    walk: dict[str, Any] = models.get("walk_in_shaped_noise", models.get("random_walk", {}))
    unordered = {
        "the past predicts shuffled tokens as well, as a shift of whole responses would": not shuffled,
        "the past predicts log-ratios of random sign as well": not flipped,
        "what responses have in common at each place may explain it": inside > LEVEL,
        "no order in time stands out among all statistics": nulls.families["null_shuffled"].p_value > LEVEL,
    }
    if memory and memory["fading_seen"] and not any(unordered.values()):
        return {"verdict": "fades", "against": [], "p_values": p}
    unlikely = {
        "the likelihood is highest without one": fit["on_floor"],
        "how large it is cannot be told": not fit["on_floor"] and fit["q_interval"] is None,
        "it does not predict what was not fitted": walk.get("gain_of_walk", 1.0) <= 0,
    }
    rivalled = {
        "there are too few prompts to tell it from order over a few tokens": memory is None,
        "it predicts what was not fitted no better than order over a few tokens": memory and not memory["walk_seen"],
    }
    # The first kind of reason that there is: where there is no order, likelihoods are beside the point.
    said = ([reason for reason, holds in kind.items() if holds] for kind in (unordered, unlikely, rivalled))
    reasons = next((reasons for reasons in said if reasons), [])
    return {"verdict": "not determined" if reasons else "drift", "against": reasons, "p_values": p}


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _time_constant(fit: Fit, batch: Ratios) -> float:
    """Tokens over which the filter of `fit` forgets by a factor e: by the mean of -ln(1 - K_t) over second halves."""
    likelihood = Likelihood(batch)
    shape = fit.shape(likelihood.miss)
    _, log_total = noise.innovation_terms(likelihood.rows, shape, fit.q / fit.v)
    late = batch.mask & (batch.mask.cumsum(1) * 2 > batch.mask.sum(1, keepdims=True))
    return 1 / float((log_total.numpy() - np.log(shape.numpy()))[late].mean())


@dataclass(frozen=True)
class NoiseModel:
    """z_t ~ `profile` at its place + walk of process noise `q` in noise of variance v shape; q = 0 is no walk."""

    description: str
    v: float
    q: float = 0.0
    shape: noise.Shape = noise.SAME
    profile: NDArray[np.float64] | None = None

    def log_likelihood(self, batch: Ratios) -> np.ndarray:
        """(B, T): ln p(z_t | z_1 .. z_{t-1}), Gaussian, zero outside the mask."""
        likelihood = Likelihood(batch if self.profile is None else without(batch, self.profile))
        squares, logs = noise.innovation_terms(likelihood.rows, self.shape(likelihood.miss), self.q / self.v)
        terms = -0.5 * (math.log(2 * math.pi * self.v) + logs + squares / self.v)
        return torch.where(likelihood.rows.mask, terms, 0.0).numpy()

    @classmethod
    def of(cls, fit: Fit, profile: NDArray[np.float64] | None = None) -> "NoiseModel":
        walk = f"Q = {fit.q:.3g}, " if fit.q else ""
        v = f"V = {fit.v:.3g}"
        if fit.shape.gamma:
            v = f"V_t = {fit.v:.3g} (1 - p_t)^{fit.shape.gamma:.2f} + {fit.v * fit.shape.constant:.2g}"
        kind = "fitted together" if fit.q else "no drift" if profile is None else "a mean for each place"
        return cls(f"{walk}{v}, {kind}", fit.v, fit.q, fit.shape, profile)


def fitted_models(batch: Ratios) -> dict[str, NoiseModel]:
    """The models, fitted to `batch`; empty if its log-ratios are all 0."""
    likelihood = Likelihood(batch)
    walk, still = likelihood.walk(shaped=False), likelihood.still(shaped=False)
    if walk is None or still is None:
        return {}
    models = {
        "unit_noise": NoiseModel("V = 1, no drift", 1.0),
        "paper": NoiseModel("Q = 1e-6, V = 1, the paper's setting", 1.0, q=1e-6),
        "constant_noise": NoiseModel.of(still),
        "random_walk": NoiseModel.of(walk),
    }
    shaped, together = likelihood.still(shaped=True), likelihood.walk(shaped=True)
    if likelihood.has_probabilities and shaped is not None and together is not None:
        models["shaped_noise"] = NoiseModel.of(shaped)
        models["walk_in_shaped_noise"] = NoiseModel.of(together)
        still = shaped
    profile = profile_of(batch, still)
    models["places"] = NoiseModel.of(still, profile)
    return models


def profile_of(batch: Ratios, fit: Fit) -> NDArray[np.float64]:
    """(T,): the mean of each place, weighted by precision and shrunk by what chance alone would make of it."""
    return place_means(batch, fit.v * fit.shape(Likelihood(batch).miss).numpy())[0]


def place_means(batch: Ratios, variance: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """(T,) each, from the `variance` (B, T) of tokens: the mean of each place, shrunk by what chance alone would make
    of it, and the variance of that mean; 0 where no response has the place.
    """
    precision = np.where(batch.mask, 1 / variance, 0.0)
    place = np.maximum(batch.mask.cumsum(1) - 1, 0).ravel()
    weight = np.bincount(place, precision.ravel(), batch.mask.shape[1])
    mean = np.bincount(place, (precision * batch.log_ratio).ravel(), batch.mask.shape[1]) / np.maximum(weight, 1e-300)
    shrunk = np.asarray(mean * np.clip(1 - 1 / np.maximum(mean**2 * weight, 1e-300), 0.0, None))
    return shrunk, np.divide(1.0, weight, out=np.zeros_like(weight), where=weight > 0)


def without(batch: Ratios, profile: NDArray[np.float64]) -> Ratios:
    place = np.maximum(batch.mask.cumsum(1) - 1, 0)
    mean = np.where(place < len(profile), profile[np.minimum(place, len(profile) - 1)], 0.0)
    z = np.where(batch.mask, batch.log_ratio - mean, 0.0)
    return Ratios(log_ratio=z, mask=batch.mask, step=batch.step, old_log_probs=batch.old_log_probs)


def held_out(batch: Ratios) -> dict[str, Any] | None:
    """Predictive log-likelihood per token of each model on what was not fitted; None with one prompt of one step."""
    steps, clusters = np.unique(batch.step), clusters_of(batch)
    if len(steps) > 1:
        judged = np.isin(batch.step, steps[1::2])
    elif len(np.unique(clusters)) > 1:
        judged = clusters % 2 == 1
    else:
        return None
    train, test = batch.rows(~judged), batch.rows(judged)
    models = fitted_models(train)
    if not models or not test.mask.any():
        return None
    totals = {name: model.log_likelihood(test).sum(1) for name, model in models.items()}
    found = {}
    for name, model in models.items():
        gain, error = _gain(totals[name] - totals["constant_noise"], test)
        found[name] = {
            "description": model.description,
            "log_likelihood_per_token": float(totals[name].sum() / test.lengths.sum()),
            "gain_over_constant_noise": gain,
            "gain_error": error,
        }
    for walk, still in (("random_walk", "constant_noise"), ("walk_in_shaped_noise", "shaped_noise")):
        if walk in found:
            gain, error = _gain(totals[walk] - totals[still], test)
            found[walk] |= {"gain_of_walk": gain, "gain_of_walk_error": error}
    by = "steps" if len(steps) > 1 else "prompts" if batch.prompt_index is not None else "responses"
    return {"by": by, "fitted_steps": steps[::2].tolist(), "judged_steps": steps[1::2].tolist(), "models": found}


def _gain(difference: NDArray[np.float64], test: Ratios) -> tuple[float, float | None]:
    """The mean of a response's `difference` (B,) per token, and its standard error: prompts are what is independent."""
    clusters, tokens = clusters_of(test), test.lengths.sum()
    gain = float(difference.sum() / tokens)
    residual = np.bincount(clusters, difference - gain * test.lengths)
    number = len(residual)
    return gain, math.sqrt(float((residual**2).sum()) * number / (number - 1)) / tokens if number > 1 else None
