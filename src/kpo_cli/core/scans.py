"""Linear recursions along a row, in blocks of tokens instead of one token at a time. All tensors are float64.

A recursion over T tokens in a Python loop costs T kernel launches. In blocks of C tokens, all blocks of all rows
advance together: C launches inside the blocks and T / C between them.
"""

import math

import torch
from torch import Tensor

CHUNK = 32
"""Tokens per block. 16 to 64 measure alike; 32 is the middle."""
RESCALED_EVERY = 8
"""Tokens between two rescalings in `riccati_gains`: terms grow by 1 + Q/V_t a token."""
CERTAIN = 1e25
"""Q/V_t and P_0/V_t of which more makes no difference: the gain is 1 to all digits, what the state was is forgotten."""


def exponential_scan(u: Tensor, log_decay: float) -> Tensor:
    """y_t = exp(log_decay) y_{t-1} + u_t along the last axis of `u` (B, T), y_0 = 0.

    Inside a block it is one product with a constant lower-triangular Toeplitz matrix; the block ends obey the same
    recursion with the decay of a whole block, so the function calls itself on them.
    """
    rows, length = u.shape
    blocks = -(-length // CHUNK)
    lag = torch.arange(CHUNK, dtype=u.dtype, device=u.device)
    toeplitz = torch.exp(log_decay * (lag[None, :] - lag[:, None]).clamp(min=0)).triu()  # [from, to]
    padded = torch.nn.functional.pad(u, (0, blocks * CHUNK - length)) if blocks * CHUNK > length else u
    y = padded.reshape(rows * blocks, CHUNK) @ toeplitz
    if blocks > 1:
        ends = exponential_scan(y[:, -1].reshape(rows, blocks), log_decay * CHUNK)
        before = torch.nn.functional.pad(ends[:, :-1], (1, 0)).flatten()
        y.addr_(before, torch.exp(log_decay * (lag + 1)))  # in place: memory traffic is what this function costs
    return y.view(rows, blocks * CHUNK)[:, :length]


def closed_form_terms(eta: float, p0: float, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """h_t and g_t for t = 0 .. length of the Kalman filter with constant noise (V = 1, prior p0).

    Its gain is K_t = h_t / g_t, and g_t x_t = lambda g_{t-1} x_{t-1} + h_t z_t with lambda = exp(-eta): an
    exponential moving average with known weights on the way in and out.

    With d_t the denominator of the Riccati recursion, d_t = a e^(eta t) + (1 - a) e^(-eta t), these are
    g_t = d_t e^(-eta t) and h_t = (d_t - d_{t-1}) e^(-eta t); the scaling keeps both within a few units of 1 at any
    length. `expm1` and `excess` = 2a - 1 keep full precision where q is tiny and the plain form cancels.
    """
    t = torch.arange(length + 1, dtype=torch.float64, device=device)
    excess = math.tanh(eta / 2) + (p0 / math.sinh(eta) if p0 else 0.0)
    b = (1 - excess) / 2  # 1 - a
    g = 1 + b * torch.expm1(-2 * eta * t)
    h = -math.expm1(-eta) * (excess - b * torch.expm1(-(2 * t - 1) * eta))
    return h, g


def riccati_gains(precision: Tensor, q: Tensor, p0: float, kept: float = 1.0) -> Tensor:
    """Gains K_t (B, T) of the scalar Kalman filter with `precision` 1/V_t and process noise `q`, both (B, T).

    A token keeps `kept` of the state before it: 1 is a random walk. A precision of 0 is a token that is not observed:
    K = 0. One step maps P to P- / (1 + P- s), P- = kept^2 P + q, a fractional linear map; a block is the product of its
    2 x 2 matrices, which may be rescaled freely. No term is ever subtracted, so nothing cancels; in units of q, and
    without what is more than CERTAIN, nothing overflows.
    """
    unit = q.amax() if q.numel() else q.new_zeros(())
    unit = torch.where(unit > 0, unit, 1.0)  # tensors throughout: nobody waits for a device
    precision, q = (precision * unit).clamp(max=CERTAIN), q / unit
    prior = torch.clamp(p0 / unit, max=CERTAIN / torch.where(precision > 0, precision, CERTAIN).amin()) if p0 else 0.0
    s, noise, kept = _to_blocks(precision), _to_blocks(q), kept**2  # (C, B, blocks)
    n1, n2, d1, d2 = torch.ones_like(s[0]), torch.zeros_like(s[0]), torch.zeros_like(s[0]), torch.ones_like(s[0])
    for c in range(CHUNK):  # in place: memory traffic is what this function costs
        if kept != 1:
            n1.mul_(kept)
            n2.mul_(kept)
        n1.addcmul_(noise[c], d1)
        n2.addcmul_(noise[c], d2)
        d1.addcmul_(s[c], n1)
        d2.addcmul_(s[c], n2)
        if c % RESCALED_EVERY == RESCALED_EVERY - 1:
            scale = d1 + d2
            for term in (n1, n2, d1, d2):
                term.div_(scale)
    starts = [torch.zeros_like(n1[:, 0]) + prior]
    for k in range(n1.shape[1] - 1):
        starts.append((n1[:, k] * starts[-1] + n2[:, k]) / (d1[:, k] * starts[-1] + d2[:, k]))
    p = torch.stack(starts, -1)
    gains = torch.empty_like(s)
    for c in range(CHUNK):
        predicted = torch.add(noise[c], p, alpha=kept)
        weight = predicted * s[c]
        gains[c] = weight / (1 + weight)
        p = predicted / (1 + weight)
    return _from_blocks(gains, precision.shape[1])


def affine_scan(a: Tensor, b: Tensor) -> Tensor:
    """x_t = a_t x_{t-1} + b_t along the last axis of `a` and `b` (B, T), x_0 = 0, for |a_t| <= 1."""
    # Every block from 0, and how much of its start each of its tokens still holds; both replace what came in.
    kept, local = _to_blocks(a), _to_blocks(b)
    for c in range(1, CHUNK):
        local[c].addcmul_(kept[c], local[c - 1])
        kept[c].mul_(kept[c - 1])
    factor, value = kept[-1], local[-1]
    starts = [torch.zeros_like(value[:, 0])]
    for k in range(value.shape[1] - 1):
        starts.append(torch.addcmul(value[:, k], factor[:, k], starts[-1]))
    return _from_blocks(local.addcmul_(kept, torch.stack(starts, -1)), a.shape[1])


def _to_blocks(x: Tensor) -> Tensor:
    """(B, T) to (CHUNK, B, blocks), padded with zeros: the first axis is time inside a block, slices are contiguous."""
    rows, length = x.shape
    blocks = -(-length // CHUNK)
    padded = torch.nn.functional.pad(x, (0, blocks * CHUNK - length))
    return padded.reshape(rows, blocks, CHUNK).permute(2, 0, 1).clone(memory_format=torch.contiguous_format)


def _from_blocks(x: Tensor, length: int) -> Tensor:
    return x.permute(1, 2, 0).flatten(1)[:, :length]
