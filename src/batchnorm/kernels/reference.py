"""Batch normalization in plain torch, for any device and floating dtype: the oracle, and the fallback.

Forward, over the m values that each channel has in the batch (Ioffe & Szegedy 2015, algorithm 1)::

    mu    = 1/m sum x_i                 var   = 1/m sum (x_i - mu)^2
    x_hat = (x - mu) / sqrt(var + eps)  y     = activation(gamma * x_hat + beta + residual)

Backward, with z the activation's argument and s = 1 / sqrt(var + eps)::

    dz     = dy * activation'(z)        dresidual = dz
    dgamma = sum dz * x_hat             dbeta     = sum dz
    dx     = gamma * s * (dz - 1/m dbeta - x_hat * 1/m dgamma)      batch statistics
    dx     = gamma * s * dz                                         running statistics

BatchMoments are float64 (float32 on Apple's MPS, which has no other). One float can't hold mu where |mu| is far above
sqrt(var), so in float32 arithmetic it is taken as two: mu = mean + rest, with mean the float next to mu. Below, d is
x - mean; then x - mu = d - rest. The rest is taken along in numbers of a channel, so that it costs no further pass over
the values.

Tensors are (N, C, *). A mask is (N, *), each size equal or 1, True where a value counts; elsewhere y, dx and
dresidual are 0, whatever the padding holds. Half precision is computed in float32. Every function is made of
differentiable torch operations, so that the backward can itself be differentiated.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from batchnorm.kernels.records import BatchMoments

__all__ = [
    "ACTIVATIONS",
    "at_least_one",
    "backward",
    "count_of",
    "forward",
    "moments",
    "per_channel",
    "pooled",
    "renorm_correction",
    "stacked",
    "statistics_dtype",
    "widened",
]


@dataclass(frozen=True)
class Activation:
    """A nonlinearity and its derivative, both as functions of the argument z."""

    function: Callable[[Tensor], Tensor]
    derivative: Callable[[Tensor], Tensor]


def _sigmoid_derivative(z: Tensor) -> Tensor:
    s = z.sigmoid()
    return s * (1 - s)


def _silu_derivative(z: Tensor) -> Tensor:
    s = z.sigmoid()
    return s * (1 + z * (1 - s))


def _gelu_derivative(z: Tensor) -> Tensor:
    cdf = 0.5 * (1 + torch.erf(z / math.sqrt(2)))
    density = torch.exp(-0.5 * z * z) / math.sqrt(2 * math.pi)
    return cdf + z * density


ACTIVATIONS: dict[str, Activation] = {
    "relu": Activation(torch.relu, lambda z: (z > 0).to(z.dtype)),
    "leaky_relu": Activation(
        lambda z: F.leaky_relu(z, 0.01), lambda z: torch.where(z > 0, torch.ones_like(z), torch.full_like(z, 0.01))
    ),
    "silu": Activation(F.silu, _silu_derivative),
    "gelu": Activation(F.gelu, _gelu_derivative),
    "tanh": Activation(torch.tanh, lambda z: 1 - torch.tanh(z) ** 2),
    "sigmoid": Activation(torch.sigmoid, _sigmoid_derivative),
}


def widened(values: Tensor) -> Tensor:
    """The values in the dtype of the arithmetic: float32 for half precision, else their own."""
    return values.float() if values.dtype in (torch.float16, torch.bfloat16) else values


def per_channel(values: Tensor, x: Tensor) -> Tensor:
    """View (C,) values so that they broadcast along the channels of x (N, C, *)."""
    return values if x.dim() == 2 else values.view(-1, *[1] * (x.dim() - 2))


def count_of(x: Tensor, mask: Tensor | None) -> Tensor | int:
    """How many values count in each channel of x (N, C, *)."""
    if mask is None:
        return x.numel() // max(x.shape[1], 1)
    return mask.expand(x.shape[0], *x.shape[2:]).sum()


def at_least_one(count: Tensor | int) -> Tensor | int:
    """The count as a divisor: 1 where it is smaller."""
    return count.clamp(min=1) if isinstance(count, Tensor) else max(count, 1)


def _sum(values: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    return values.sum([d for d in range(values.dim()) if d != 1], dtype=dtype)


def _where(counts: Tensor | None, values: Tensor) -> Tensor:
    return values if counts is None else torch.where(counts, values, 0.0)


def statistics_dtype(x: Tensor) -> torch.dtype:
    """The dtype of moments: float64 where the device has it."""
    return torch.float32 if x.device.type == "mps" else torch.float64


def moments(x: Tensor, mask: Tensor | None = None) -> BatchMoments:
    """Mean and biased variance of each channel of x (N, C, *), over the values that count.

    Centred before it is squared, never E[x^2] - E[x]^2. A constant channel of float32 numbers has that constant
    for its mean, and a variance of exactly 0.
    """
    x = widened(x)
    counts, count = None if mask is None else mask.unsqueeze(1), count_of(x, mask)
    divisor = at_least_one(count)
    dtype = statistics_dtype(x)
    mean = _sum(_where(counts, x), dtype) / divisor
    d, rest = _centred(x, mean)
    # Squared in the wider type, where values near 1e30 have a variance.
    d = _where(counts, d).to(dtype)
    return BatchMoments(mean, _sum(d * d) / divisor - rest * rest, count)


def stacked(parts: Sequence[BatchMoments]) -> BatchMoments:
    """The moments (K, C) of several batches, and their counts (K,), for `pooled`."""
    mean, var = torch.stack([part.mean for part in parts]), torch.stack([part.var for part in parts])
    # torch.full keeps a size open in a compiled graph, which torch.as_tensor would fix.
    counts = [
        part.count.to(mean.dtype)
        if isinstance(part.count, Tensor)
        else torch.full((), part.count, dtype=mean.dtype, device=mean.device)
        for part in parts
    ]
    return BatchMoments(mean, var, torch.stack(counts))


def pooled(parts: BatchMoments) -> BatchMoments:
    """The moments (C,) of several batches together, from those of each (K, C) and their counts (K,).

    Chan, Golub & LeVeque (1979). A batch with a count of 0 is left out whatever its moments.
    """
    counts = torch.as_tensor(parts.count, dtype=parts.mean.dtype, device=parts.mean.device).unsqueeze(1)
    total = counts.sum(0)
    share = counts / total.clamp(min=1)
    mean, var = (torch.where(counts > 0, values, 0.0) for values in (parts.mean, parts.var))
    # About the mean of the means, since the sum of shares times means is off by a rounding of the mean itself.
    about = mean.mean(0)
    whole = about + (share * torch.where(counts > 0, mean - about, 0.0)).sum(0)
    away = torch.where(counts > 0, mean - whole, 0.0)
    return BatchMoments(whole, (share * (var + away * away)).sum(0), total.squeeze(0))


def renorm_correction(
    batch: BatchMoments, mean: Tensor, var: Tensor, eps: float, r_max: float | Tensor, d_max: float | Tensor
) -> tuple[Tensor, Tensor]:
    """The r and d of batch renormalization, from the batch's moments and the running ones.

    Ioffe (2017), algorithm 1::

        r = sigma_B / sigma, within 1 / r_max and r_max     d = (mu_B - mu) / sigma, within -d_max and d_max

    with ``sigma_B = sqrt(var_B + eps)`` and ``sigma = sqrt(var + eps)``. What is normalised is then
    ``r * x_hat + d``; r and d are constants to the gradient.
    """
    dtype = batch.mean.dtype
    batch_mean, batch_var, mean, var = (v.detach().to(dtype) for v in (batch.mean, batch.var, mean, var))
    sigma = (var + eps).sqrt()
    r = (batch_var + eps).sqrt() / sigma
    d = (batch_mean - mean) / sigma
    return _within(r, 1 / r_max, r_max), _within(d, -d_max, d_max)


def _within(values: Tensor, low: float | Tensor, high: float | Tensor) -> Tensor:
    low, high = (torch.as_tensor(bound, dtype=values.dtype, device=values.device) for bound in (low, high))
    return torch.clamp(values, low, high)


def _centred(x: Tensor, mean: Tensor) -> tuple[Tensor, Tensor]:
    """The input minus the mean as its dtype has it, and what that leaves of the mean (C,)."""
    rounded = mean.to(x.dtype)
    return x - per_channel(rounded, x), mean - rounded.to(mean.dtype)


def _gain(var: Tensor, weight: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    """1 / sqrt(var + eps), and what a channel is multiplied by: gamma times it."""
    scale = torch.rsqrt(var + eps)
    return scale, scale if weight is None else scale * weight.to(scale.dtype)


def _argument(d: Tensor, gain: Tensor, rest: Tensor, bias: Tensor | None, residual: Tensor | None) -> Tensor:
    """What the activation is applied to: gamma * x_hat + beta + residual."""
    shift = -gain * rest if bias is None else bias.to(gain.dtype) - gain * rest
    z = d * per_channel(gain.to(d.dtype), d) + per_channel(shift.to(d.dtype), d)
    return z if residual is None else z + residual.to(z.dtype)


def forward(
    x: Tensor,
    statistics: BatchMoments,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    activation: str | None = None,
    residual: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """Normalise x (N, C, *) with the statistics given, scale, shift, add the residual, apply the activation."""
    d, rest = _centred(widened(x), statistics.mean)
    _, gain = _gain(statistics.var, weight, eps)
    z = _argument(d, gain, rest, bias, residual)
    y = z if activation is None else ACTIVATIONS[activation].function(z)
    return _where(None if mask is None else mask.unsqueeze(1), y).to(x.dtype)


def backward(
    dy: Tensor,
    x: Tensor,
    statistics: BatchMoments,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    activation: str | None = None,
    residual: Tensor | None = None,
    mask: Tensor | None = None,
    *,
    y: Tensor | None = None,
    batch_statistics: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients (dx, dweight, dbias, dresidual) of `forward`, by the formulas at the top of this file.

    ``batch_statistics`` says whether the statistics are x's own, and so depend on it. Where the activation's
    derivative is told by the sign alone, y may be given in the place of the residual.
    """
    counts = None if mask is None else mask.unsqueeze(1)
    scale, gain = _gain(statistics.var, weight, eps)
    d, rest = _centred(widened(x), statistics.mean)
    d, dz = _where(counts, d), _where(counts, widened(dy))
    if activation is not None:
        kept = None if residual is None else _where(counts, residual)
        z = _argument(d, gain, rest, bias, kept) if y is None else widened(y)
        dz = dz * ACTIVATIONS[activation].derivative(z)
    dbias = _sum(dz).to(gain.dtype)
    dweight = scale * (_sum(dz * d).to(gain.dtype) - rest * dbias)
    dx = dz * per_channel(gain.to(dz.dtype), dz)
    if batch_statistics:
        slope = gain * scale * dweight / at_least_one(statistics.count)
        level = gain * dbias / at_least_one(statistics.count) - slope * rest
        dx = dx - d * per_channel(slope.to(d.dtype), d) - per_channel(level.to(d.dtype), d)
    return _where(counts, dx).to(x.dtype), dweight, dbias, dz
