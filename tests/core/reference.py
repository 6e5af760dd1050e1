"""Independent truths: every formula once more, in plain Python floats, one token at a time.

Written from the papers' equations, sharing no code with `kpo_cli.core`. Rows are lists over the valid tokens of one
response; the gradients are derived by hand, with respect to the log-probability of each token.
"""

import itertools
import math


def kalman(z, q, v, p0=0.0, observed=None):
    """The scalar Kalman recursion, x_0 = 0, P_0 = p0. A token that is not observed is predicted over."""
    x, p, out = 0.0, p0, []
    for t, value in enumerate(z):
        p = p + q
        if observed is None or observed[t]:
            gain = p / (p + v)
            x = x + gain * (value - x)
            p = (1 - gain) * p
        out.append(x)
    return out


def kalman_dense(z, q, v, p0=0.0, observed=None):
    """E[x_t | z_1 .. z_t] from the joint Gaussian of states and observations: no recursion at all.

    `v` is a number or one for each token; tokens that are not observed are left out of the observations.
    """
    import numpy as np

    n = len(z)
    steps = np.minimum.outer(np.arange(1, n + 1), np.arange(1, n + 1))
    states = p0 + q * steps  # Cov(x_s, x_t) of a random walk
    noise = np.diag(np.broadcast_to(v, n))
    seen = np.arange(n) if observed is None else np.flatnonzero(observed)
    out = []
    for t in range(n):
        past = seen[seen <= t]
        observations = (states + noise)[np.ix_(past, past)]
        out.append(float(states[t, past] @ np.linalg.solve(observations, np.asarray(z)[past])))
    return out


def steady_gain(q, v):
    """Where the Kalman recursion's own gain ends up: P- = P + q with P = P- v / (P- + v) is a quadratic in P-."""
    predicted = (q + math.sqrt(q * q + 4 * q * v)) / 2
    return predicted / (predicted + v)


def ema(z, gain, observed=None):
    """Exponential moving average from 0; it holds at tokens that are not observed."""
    x, out = 0.0, []
    for t, value in enumerate(z):
        if observed is None or observed[t]:
            x += gain * (value - x)
        out.append(x)
    return out


def steady(z, q, v, observed=None):
    return ema(z, steady_gain(q, v), observed)


def robust(z, q, v, kappa, p0=0.0, observed=None):
    """The Kalman recursion with the innovation cut at kappa of its standard deviations."""
    x, p, out = 0.0, p0, []
    for t, value in enumerate(z):
        p = p + q
        if observed is None or observed[t]:
            gain, bound = p / (p + v), kappa * math.sqrt(p + v)
            x += gain * min(max(value - x, -bound), bound)
            p *= 1 - gain
        out.append(x)
    return out


def kalman_varying(z, q, variances, p0=0.0, observed=None):
    """A variance for each observation."""
    x, p, out = 0.0, p0, []
    for t, (value, v) in enumerate(zip(z, variances, strict=True)):
        p = p + q
        if observed is None or observed[t]:
            # P v / (P + v) and not (1 - K) P, which cancels where v is tiny.
            x += p / (p + v) * (value - x)
            p = p * v / (p + v)
        out.append(x)
    return out


def mean(values):
    return sum(values) / len(values)


def filtered(name, ratio_filter, z, old, observed=None):
    """What the filter of that name and with the parameters of `ratio_filter` makes of one row."""
    f = ratio_filter
    if name == "identity":
        return list(z)
    if name == "sequence_mean":
        return [mean(z)] * len(z)
    if name == "prefix_sum":
        return list(itertools.accumulate(x if observed is None or observed[t] else 0.0 for t, x in enumerate(z)))
    if name == "ema":
        return ema(z, f.gain, observed)
    if name == "steady_kalman":
        return steady(z, f.q, f.v, observed)
    if name in ("kalman", "kalman_p0", "kalman_adaptive"):
        return kalman(z, f.q, f.v, f.p0, observed)
    if name == "kalman_adaptive_shaped":
        variances = [f.v * ((-math.expm1(x)) ** f.gamma + f.constant) for x in old]
        return kalman_varying(z, f.q, variances, f.p0, observed)
    if name == "kalman_robust":
        return robust(z, f.q, f.v, f.kappa, f.p0, observed)
    variances = [f.v * max(-math.expm1(x), f.miss_floor) ** f.gamma for x in old]
    return kalman_varying(z, f.q, variances, f.p0, observed)


def clip_loss(log_ratio, advantage, eps_low, eps_high):
    """PPO's -min(r A, clip(r) A); value, d(value)/d(log r), and whether the clip decided."""
    r = math.exp(log_ratio)
    clipped = min(max(r, 1 - eps_low), 1 + eps_high)
    if clipped * advantage < r * advantage:
        return -clipped * advantage, 0.0, True
    return -r * advantage, -r * advantage, False


def sign(x):
    return (x > 0) - (x < 0)


def method_loss(method, log_probs, old_log_probs, advantages, **p):
    """Loss and gradient of a batch: lists of rows (valid tokens only), one advantage a row."""
    n, total = len(log_probs), sum(map(len, log_probs))
    loss, gradient, cut = 0.0, [], []
    for lp, old, a in zip(log_probs, old_log_probs, advantages, strict=True):
        z = [x - y for x, y in zip(lp, old, strict=True)]
        t = len(z)
        if method in ("dapo", "cispo", "ctpo", "vespo", "dppo"):
            weight = 1 / total
        elif method == "dr_grpo":
            weight = 1 / n / p["length"]
        else:
            weight = 1 / t / n
        row_gradient, row_cut = [], []
        for i in range(t):
            value, slope, was_cut = token_term(method, z, lp, old, i, a, p)
            loss += value * weight
            row_gradient.append(slope * weight)
            row_cut.append(was_cut)
        gradient.append(row_gradient)
        cut.append(row_cut)
    return loss, gradient, cut


def token_term(method, z, lp, old, i, a, p):
    """Value, gradient and clip of one token."""
    if method in ("grpo", "grpo_tight", "dapo", "dr_grpo"):
        return clip_loss(z[i], a, p["eps_low"], p["eps_high"])
    if method in ("gspo", "gspo_token"):
        # s_i's gradient reaches each of the T tokens with weight 1/T; T equal terms over T tokens make it one.
        return clip_loss(mean(z), a, p["eps_low"], p["eps_high"])
    if method == "token_clip":
        r = math.exp(z[i])
        w = min(max(r, 1 - p["eps_low"]), 1 + p["eps_high"])
        return -w * a * lp[i], -w * a, w != r
    if method == "cispo":
        w = min(math.exp(z[i]), p["cap"])
        return -w * a * lp[i], -w * a, w != math.exp(z[i])
    if method == "gmpo":
        limit = {1: lambda x: min(x, p["eps_high"]), -1: lambda x: max(x, -p["eps_low"]), 0: lambda x: x}[sign(a)]
        s = math.exp(mean([limit(x) for x in z]))
        was_cut = limit(z[i]) != z[i]
        return -s * a, 0.0 if was_cut else -s * a, was_cut
    if method == "sapo":
        tau = p["tau_positive"] if a > 0 else p["tau_negative"]
        r = math.exp(z[i])
        g = 1 / (1 + math.exp(-tau * (r - 1)))
        return -4 / tau * g * a, -4 * g * (1 - g) * r * a, False
    if method == "ctpo":
        root = math.sqrt(i + 1)
        low, high = -p["eps_low"] * root, p["eps_high"] * root
        x = sum(z[: i + 1])
        if a > 0:
            return (-a * math.exp(high), 0.0, True) if x > high else (-a * math.exp(x), -a * math.exp(x), False)
        kept = min(max(x, low), high)
        was_cut = kept != x and a != 0
        return -a * math.exp(kept), 0.0 if was_cut else -a * math.exp(x), was_cut
    if method == "vespo":
        w = math.exp(min(max(sum(z), math.log(1e-8)), 20))
        k, rate = (2.0, 3.0) if a >= 0 else (3.0, 2.0)
        phi = w**k * math.exp(rate * (1 - w))
        return -phi * a * lp[i], -phi * a, False
    if method == "dppo":
        moved = math.exp(lp[i]) - math.exp(old[i])
        if (a > 0 and moved > p["delta"]) or (a <= 0 and moved < -p["delta"]):
            return 0.0, 0.0, True
        return -math.exp(z[i]) * a * lp[i], -math.exp(z[i]) * a, False
    if method == "ema_kpo":
        x = steady(z, p["q"], p["v"])[i]
    elif method == "robust_kpo":
        x = robust(z, p["q"], p["v"], p["kappa"])[i]
    else:
        x = kalman(z, p["q"], p["v"])[i]
    if method == "kpo_unclipped":
        return -math.exp(x) * a, -math.exp(x) * a, False
    assert method in ("kpo", "ema_kpo", "robust_kpo"), method
    return clip_loss(x, a, p["eps_low"], p["eps_high"])
