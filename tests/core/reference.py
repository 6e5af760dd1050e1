"""Independent truths: every formula once more, in plain Python floats, one token at a time.

Written from the papers' equations, sharing no code with `kpo_cli.core`. Rows are lists over the valid tokens of one
response; the gradients are derived by hand, with respect to the log-probability of each token.
"""

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


def kalman_dense(z, q, v, p0=0.0):
    """E[x_t | z_1 .. z_t] from the joint Gaussian of states and observations: no recursion at all."""
    import numpy as np

    n = len(z)
    steps = np.minimum.outer(np.arange(1, n + 1), np.arange(1, n + 1))
    states = p0 + q * steps  # Cov(x_s, x_t) of a random walk
    out = []
    for t in range(1, n + 1):
        observations = states[:t, :t] + v * np.eye(t)
        out.append(float(states[t - 1, :t] @ np.linalg.solve(observations, np.asarray(z[:t]))))
    return out


def mean(values):
    return sum(values) / len(values)


def clip_loss(log_ratio, advantage, eps_low, eps_high):
    """PPO's -min(r A, clip(r) A); value, d(value)/d(log r), and whether the clip decided."""
    r = math.exp(log_ratio)
    clipped = min(max(r, 1 - eps_low), 1 + eps_high)
    if clipped * advantage < r * advantage:
        return -clipped * advantage, 0.0, True
    return -r * advantage, -r * advantage, False


def method_loss(method, log_probs, old_log_probs, advantages, **p):
    """Loss and gradient of a batch: lists of rows (valid tokens only), one advantage a row."""
    n = len(log_probs)
    loss, gradient, cut = 0.0, [], []
    for lp, old, a in zip(log_probs, old_log_probs, advantages, strict=True):
        z = [x - y for x, y in zip(lp, old, strict=True)]
        t = len(z)
        row_gradient, row_cut = [], []
        for i in range(t):
            value, slope, was_cut = token_term(method, z, lp, i, a, p)
            loss += value / t / n
            row_gradient.append(slope / t / n)
            row_cut.append(was_cut)
        gradient.append(row_gradient)
        cut.append(row_cut)
    return loss, gradient, cut


def token_term(method, z, lp, i, a, p):
    """Value, gradient and clip of one token under seq-mean-token-mean."""
    if method in ("grpo", "grpo_tight"):
        return clip_loss(z[i], a, p["eps_low"], p["eps_high"])
    if method == "gspo":
        # s_i's gradient reaches each of the T tokens with weight 1/T; T equal terms over T tokens make it one.
        return clip_loss(mean(z), a, p["eps_low"], p["eps_high"])
    if method == "token_clip":
        r = math.exp(z[i])
        w = min(max(r, 1 - p["eps_low"]), 1 + p["eps_high"])
        return -w * a * lp[i], -w * a, w != r
    x = kalman(z, p["q"], p["v"])[i]
    if method == "kpo":
        return clip_loss(x, a, p["eps_low"], p["eps_high"])
    if method == "kpo_unclipped":
        return -math.exp(x) * a, -math.exp(x) * a, False
    raise AssertionError(method)
