"""Which noise the raw log-ratios look like: maximum likelihood, and the likelihood of steps that were not fitted.

The random walk in noise of KPO (arXiv 2602.10609) is fitted by `kpo_cli.core.noise`. Its standard errors are those of
independent Gaussian noise, which log-ratios are not; beside them stands the jackknife over groups of responses,
which assumes neither. Predictive log-likelihood compares noise models on equal terms: each is fitted on every second
recorded step and judged on the others, mean nats per token, higher is better.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kpo_cli.core import noise
from kpo_cli.core.recursion import Rows, kalman_gains, kalman_states
from kpo_cli.runs.ratios import Ratios

GROUPS = 20
"""Of the jackknife."""
MISS_FLOOR = 1e-4


def drift_fit(batch: Ratios) -> dict[str, Any] | None:
    """Maximum-likelihood Q and V of the raw log-ratios, with both kinds of standard error; None if z is all 0."""
    z, mask = _tensors(batch)
    groups = min(GROUPS, len(batch))
    sums = torch.stack([noise.drift_sums(z[i::groups], mask[i::groups]) for i in range(groups)])
    total = sums.sum(0)
    fit = noise.fit_drift(total)
    if fit is None:
        return None
    tokens = int(mask.sum())
    # d ln V = dV / V; the variance of the estimate of a Gaussian variance is 2 V^2 / N.
    found: dict[str, Any] = {
        "q": fit.q,
        "v": fit.v,
        "q_over_v": fit.q / fit.v,
        "on_floor": fit.on_floor,
        "tokens": tokens,
        "responses": len(batch),
        "log_q_over_v_error": None if math.isinf(fit.log_q_over_v_error) else fit.log_q_over_v_error,
        "log_v_error": math.sqrt(2 / tokens),
        "log_q_over_v_error_jackknife": None,
        "log_v_error_jackknife": None,
    }
    if groups > 1:
        left_out = [noise.fit_drift(total - part) for part in sums]
        fits = [each for each in left_out if each is not None]
        found["log_v_error_jackknife"] = _jackknife([math.log(each.v) for each in fits])
        if not fit.on_floor:
            found["log_q_over_v_error_jackknife"] = _jackknife([math.log(each.q / each.v) for each in fits])
    return found


def _jackknife(values: list[float]) -> float:
    n = len(values)
    return math.sqrt((n - 1) / n * sum((value - sum(values) / n) ** 2 for value in values))


@dataclass(frozen=True)
class NoiseModel:
    """z_t ~ random walk of process noise `q` in noise of variance v miss_t^gamma; q = 0 is no drift at all."""

    description: str
    v: float
    q: float = 0.0
    gamma: float = 0.0

    def log_likelihood(self, batch: Ratios) -> np.ndarray:
        """(B, T): ln p(z_t | z_1 .. z_{t-1}), zero outside the mask.

        Gaussian with mean x_{t-1} and variance P- + V_t. With q > 0, V is constant: then P- + V = V / (1 - K) and the
        innovation e is (z - x_t) / (1 - K).
        """
        z, mask = _tensors(batch)
        if self.q > 0:
            rows = Rows.of(z, mask)
            gain = kalman_gains(rows, self.q / self.v, 0.0)
            innovation = (rows.z - kalman_states(rows, self.q / self.v, 0.0)) / (1 - gain)
            variance = self.v / (1 - gain)
        else:
            innovation, variance = z, self.v * _miss(batch) ** self.gamma
        terms = -0.5 * (torch.log(2 * math.pi * variance) + innovation.square() / variance)
        return torch.where(mask, terms, 0.0).numpy()


def fitted_models(batch: Ratios) -> dict[str, NoiseModel]:
    """The models, fitted to `batch`; empty if its log-ratios are all 0."""
    z, mask = _tensors(batch)
    drift = noise.fit_drift(noise.drift_sums(z, mask))
    if drift is None:
        return {}
    best = float(z[mask].square().mean())
    models = {
        "unit_noise": NoiseModel("V = 1, no drift", 1.0),
        "paper": NoiseModel("Q = 1e-6, V = 1, the paper's setting", 1.0, q=1e-6),
        "constant_noise": NoiseModel(f"V = {best:.3g}, no drift", best),
        "random_walk": NoiseModel(f"Q = {drift.q:.3g}, V = {drift.v:.3g}, fitted together", drift.v, q=drift.q),
    }
    if batch.old_log_probs is not None:
        sums = noise.miss_sums(z, torch.from_numpy(batch.old_log_probs).double(), mask, MISS_FLOOR)
        fit = noise.fit_miss(sums)
        if fit is not None:
            v, gamma = fit
            text = f"V_t = {v:.3g} (1 - p_t)^{gamma:.2f}, no drift"
            models["heteroscedastic"] = NoiseModel(text, v, gamma=gamma)
    return models


def held_out(batch: Ratios) -> dict[str, Any] | None:
    """Predictive log-likelihood per token of each model on every second step; None with fewer than two steps."""
    steps = np.unique(batch.step)
    if len(steps) < 2:
        return None
    judged = np.isin(batch.step, steps[1::2])
    train, test = batch.rows(~judged), batch.rows(judged)
    models = fitted_models(train)
    if not models or not test.mask.any():
        return None
    lengths, reference = test.lengths, models["constant_noise"].log_likelihood(test).sum(1)
    found = {}
    for name, model in models.items():
        totals = model.log_likelihood(test).sum(1)
        gain = (totals - reference).sum() / lengths.sum()
        # Standard error of a quotient of sums over independent responses.
        residual = totals - reference - gain * lengths
        error = math.sqrt(float((residual**2).sum())) / lengths.sum()
        found[name] = {
            "description": model.description,
            "log_likelihood_per_token": float(totals.sum() / lengths.sum()),
            "gain_over_constant_noise": float(gain),
            "gain_error": float(error),
        }
    return {"fitted_steps": steps[::2].tolist(), "judged_steps": steps[1::2].tolist(), "models": found}


def _tensors(batch: Ratios) -> tuple[Tensor, Tensor]:
    return torch.from_numpy(batch.log_ratio.astype(np.float64)), torch.from_numpy(batch.mask)


def _miss(batch: Ratios) -> Tensor:
    if batch.old_log_probs is None:
        return torch.ones(batch.mask.shape, dtype=torch.float64)
    return (-torch.expm1(torch.from_numpy(batch.old_log_probs).double())).clamp(min=MISS_FLOOR)
