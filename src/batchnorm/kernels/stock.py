"""Torch's own fused kernels, taken to values that are shifted by their mean first.

On such values they are exact where they alone are not (|mean| far above the standard deviation, constants), and they
take a fraction of the time of the reference. For float32 and float64 batches without a mask, on CPU and CUDA.
"""

from __future__ import annotations

import torch
from torch import Tensor

from batchnorm.kernels.reference import Moments, mean_of, per_channel

__all__ = ["backward", "forward", "supports"]


def supports(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> bool:
    """Whether torch's kernels take this batch (N, C, *) and these parameters (C,)."""
    return (
        x.dtype in (torch.float32, torch.float64)
        and x.device.type in ("cpu", "cuda")
        and x.numel() > 0
        and all(values is None or values.dtype == x.dtype for values in (weight, bias))
    )


def forward(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> tuple[Tensor, Moments, Tensor]:
    """Normalise a batch with its own statistics; returns y, the moments, and 1 / sqrt(var + eps) (C,)."""
    count = x.numel() // x.shape[1]
    mean = mean_of(x, count).to(x.dtype)
    shifted = x - per_channel(mean, x)
    mean_left, unbiased = torch.zeros_like(mean), torch.zeros_like(mean)
    # With momentum 1 the kernel's running statistics are those of the batch.
    y, rest, scale = torch.native_batch_norm(shifted, weight, bias, mean_left, unbiased, True, 1.0, eps)
    return y, Moments(mean, rest, unbiased * ((count - 1) / count), count), scale


def backward(
    dy: Tensor, x: Tensor, moments: Moments, scale: Tensor, weight: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients (dx, dweight, dbias) of `forward`."""
    shifted = x - per_channel(moments.mean, x)
    dx, dweight, dbias = torch.ops.aten.native_batch_norm_backward(
        dy, shifted, weight, None, None, moments.rest, scale, True, eps, [True, True, True]
    )
    return dx, dweight, dbias
