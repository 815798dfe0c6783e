"""Batch normalization in torch operations, for any device and floating dtype: the oracle, and the fallback.

Forward, over the m values that each channel has in the batch (Ioffe & Szegedy 2015, algorithm 1)::

    mu    = 1/m sum x_i                 var   = 1/m sum (x_i - mu)^2
    x_hat = (x - mu) / sqrt(var + eps)  y     = activation(gamma * x_hat + beta + residual)

Backward, with z the activation's argument and s = 1 / sqrt(var + eps)::

    dz     = dy * activation'(z)        dresidual = dz
    dgamma = sum dz * x_hat             dbeta     = sum dz
    dx     = gamma * s * (dz - 1/m dbeta - x_hat * 1/m dgamma)      batch statistics
    dx     = gamma * s * dz                                         running statistics

Moments are float64 (float32 on Apple's MPS, which has no float64). One float can't hold mu where |mu| is far above
sqrt(var), so float32 arithmetic uses two: mu = mean + rest, where mean is the float nearest to mu. Below, d is
x - mean, hence x - mu = d - rest. The rest is folded into the numbers per channel, so that it costs no further pass
over the values.

Tensors are (N, C, *). A mask is (N, *), each size equal or 1, True where a value counts; elsewhere y, dx and
dresidual are 0, whatever the padding contains. Half precision is computed in float32. Every function consists of
differentiable torch operations, so that the backward can itself be differentiated.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from batchnorm.kernels.records import BatchMoments, Operands, Rule

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
    """Return the values in the dtype of the arithmetic: float32 for half precision, else their own."""
    return values.float() if values.dtype in (torch.float16, torch.bfloat16) else values


def per_channel(values: Tensor, x: Tensor) -> Tensor:
    """View (C,) values so that they broadcast along the channels of x (N, C, *)."""
    return values if x.dim() == 2 else values.view(-1, *[1] * (x.dim() - 2))


def count_of(x: Tensor, mask: Tensor | None) -> Tensor | int:
    """Return the number of values that count in each channel of x (N, C, *)."""
    if mask is None:
        return x.numel() // max(x.shape[1], 1)
    return mask.expand(x.shape[0], *x.shape[2:]).sum()


def at_least_one(count: Tensor | int) -> Tensor | int:
    """Return the count, or 1 where it is smaller, as a divisor."""
    return count.clamp(min=1) if isinstance(count, Tensor) else max(count, 1)


def _sum(values: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    return values.sum([d for d in range(values.dim()) if d != 1], dtype=dtype)


def _where(counts: Tensor | None, values: Tensor) -> Tensor:
    return values if counts is None else torch.where(counts, values, 0.0)


def statistics_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype of moments: float64 where the device has it."""
    return torch.float32 if x.device.type == "mps" else torch.float64


def moments(x: Tensor, mask: Tensor | None = None) -> BatchMoments:
    """Return mean and biased variance of each channel of x (N, C, *), over the values that count.

    Values are centered before they are squared; E[x^2] - E[x]^2 is never used. A constant channel of float32 numbers
    has that constant as its mean, and a variance of exactly 0.
    """
    x = widened(x)
    counts, count = None if mask is None else mask.unsqueeze(1), count_of(x, mask)
    divisor = at_least_one(count)
    dtype = statistics_dtype(x)
    mean = _sum(_where(counts, x), dtype) / divisor
    d, rest = _centered(x, mean)
    # They are squared in the wider type, in which values near 1e30 have a variance.
    d = _where(counts, d).to(dtype)
    return BatchMoments(mean, _sum(d * d) / divisor - rest * rest, count)


def stacked(parts: Sequence[BatchMoments]) -> BatchMoments:
    """Return the moments (K, C) of several batches, and their counts (K,), for `pooled`."""
    mean, var = torch.stack([part.mean for part in parts]), torch.stack([part.var for part in parts])
    # new_full keeps a size open in a compiled graph, which as_tensor would fix, and gives a DTensor of one.
    counts = [
        part.count.to(mean.dtype)
        if isinstance(part.count, Tensor)
        else part.mean.new_full((), part.count).to(mean.dtype)
        for part in parts
    ]
    return BatchMoments(mean, var, torch.stack(counts))


def pooled(parts: BatchMoments) -> BatchMoments:
    """Return the moments (C,) of several batches together, from those of each (K, C) and their counts (K,).

    The formula is that of Chan, Golub & LeVeque (1979). A batch with a count of 0 is left out whatever its moments.
    """
    counts = torch.as_tensor(parts.count, dtype=parts.mean.dtype, device=parts.mean.device).unsqueeze(1)
    total = counts.sum(0)
    share = counts / total.clamp(min=1)
    mean, var = (torch.where(counts > 0, values, 0.0) for values in (parts.mean, parts.var))
    # Computed about the mean of the means, since a sum of shares times means rounds at the size of the mean itself.
    about = mean.mean(0)
    whole = about + (share * torch.where(counts > 0, mean - about, 0.0)).sum(0)
    away = torch.where(counts > 0, mean - whole, 0.0)
    return BatchMoments(whole, (share * (var + away * away)).sum(0), total.squeeze(0))


def renorm_correction(
    batch: BatchMoments, mean: Tensor, var: Tensor, eps: float, r_max: float | Tensor, d_max: float | Tensor
) -> tuple[Tensor, Tensor]:
    """Return the r and d of batch renormalization, from the batch's moments and the running mean and variance.

    Ioffe (2017), algorithm 1::

        r = sigma_B / sigma, within 1 / r_max and r_max     d = (mu_B - mu) / sigma, within -d_max and d_max

    with ``sigma_B = sqrt(var_B + eps)`` and ``sigma = sqrt(var + eps)``. The normalized value is then
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


def _centered(x: Tensor, mean: Tensor) -> tuple[Tensor, Tensor]:
    """Return the input minus the mean rounded to its dtype, and the rest of the mean (C,)."""
    rounded = mean.to(x.dtype)
    return x - per_channel(rounded, x), mean - rounded.to(mean.dtype)


def _gain(var: Tensor, weight: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    """Return 1 / sqrt(var + eps), and the factor of a channel: gamma times that."""
    scale = torch.rsqrt(var + eps)
    return scale, scale if weight is None else scale * weight.to(scale.dtype)


def _argument(d: Tensor, gain: Tensor, rest: Tensor, bias: Tensor | None, residual: Tensor | None) -> Tensor:
    """Return the argument of the activation: gamma * x_hat + beta + residual."""
    shift = -gain * rest if bias is None else bias.to(gain.dtype) - gain * rest
    z = d * per_channel(gain.to(d.dtype), d) + per_channel(shift.to(d.dtype), d)
    return z if residual is None else z + residual.to(z.dtype)


def forward(operands: Operands, moments: BatchMoments, rule: Rule) -> Tensor:
    """Normalize x with the moments given, scale, shift, add the residual, and apply the activation.

    The rule's eps and activation are used; `ops.chunks` applies its chunks and correction.
    """
    x, weight, bias, residual, mask = operands
    d, rest = _centered(widened(x), moments.mean)
    _, gain = _gain(moments.var, weight, rule.eps)
    z = _argument(d, gain, rest, bias, residual)
    y = z if rule.activation is None else ACTIVATIONS[rule.activation].function(z)
    return _where(None if mask is None else mask.unsqueeze(1), y).to(x.dtype)


def backward(
    dy: Tensor, operands: Operands, moments: BatchMoments, rule: Rule, *, y: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients (dx, dweight, dbias, dresidual) of `forward`, by the formulas at the top of this file.

    In training the moments are those of x, and so depend on it. Where the sign alone determines the activation's
    derivative, y may be given instead of the residual.
    """
    x, weight, bias, residual, mask = operands
    counts = None if mask is None else mask.unsqueeze(1)
    scale, gain = _gain(moments.var, weight, rule.eps)
    d, rest = _centered(widened(x), moments.mean)
    d, dz = _where(counts, d), _where(counts, widened(dy))
    if rule.activation is not None:
        kept = None if residual is None else _where(counts, residual)
        z = _argument(d, gain, rest, bias, kept) if y is None else widened(y)
        dz = dz * ACTIVATIONS[rule.activation].derivative(z)
    dbias = _sum(dz).to(gain.dtype)
    dweight = scale * (_sum(dz * d).to(gain.dtype) - rest * dbias)
    dx = dz * per_channel(gain.to(dz.dtype), dz)
    if rule.training:
        slope = gain * scale * dweight / at_least_one(moments.count)
        level = gain * dbias / at_least_one(moments.count) - slope * rest
        dx = dx - d * per_channel(slope.to(d.dtype), d) - per_channel(level.to(d.dtype), d)
    return _where(counts, dx).to(x.dtype), dweight, dbias, dz
