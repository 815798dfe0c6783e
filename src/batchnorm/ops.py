"""Batch normalization as a differentiable operation on tensors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from batchnorm.kernels import reference, stock
from batchnorm.kernels.reference import Moments

__all__ = ["normalize_with", "normalize_with_batch"]


class _BatchNorm(torch.autograd.Function):
    """y = activation(weight * x_hat + bias + residual), with the hand-derived gradient.

    The moments given are running statistics; without them the batch's own are taken, and returned.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        mask: Tensor | None,
        given: Moments | None,
        eps: float,
        activation: str | None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        plain = given is None and activation is None and residual is None and mask is None
        scale = None
        if plain and stock.supports(x, weight, bias):
            y, used, scale = stock.forward(x, weight, bias, eps)
        else:
            used = reference.moments(x, mask) if given is None else given
            y = reference.forward(x, used, weight, bias, eps, activation, residual, mask)
        count = used.count if isinstance(used.count, Tensor) else None
        keep_residual = residual if activation is not None else None
        ctx.save_for_backward(x, weight, bias, keep_residual, mask, used.mean, used.rest, used.var, count, scale)
        ctx.number = None if isinstance(used.count, Tensor) else used.count
        ctx.batch_statistics, ctx.eps, ctx.activation = given is None, eps, activation
        ctx.residual_dtype = None if residual is None else residual.dtype
        mean = used.mean + used.rest
        ctx.mark_non_differentiable(mean, used.var)
        ctx.set_materialize_grads(False)
        return y, mean, used.var, count

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        if dy is None:
            return (None,) * 8
        x, weight, bias, residual, mask, mean, rest, var, count, scale = ctx.saved_tensors
        used = Moments(mean, rest, var, ctx.number if count is None else count)
        dresidual = None
        if scale is not None and not torch.is_grad_enabled():
            dx, dweight, dbias = stock.backward(dy, x, used, scale, weight, ctx.eps)
        else:
            if ctx.batch_statistics and torch.is_grad_enabled():
                # A second derivative also runs through the moments, so they are taken again where it can see them.
                used = reference.moments(x, mask)
            dx, dweight, dbias, dresidual = reference.backward(
                dy,
                x,
                used,
                weight,
                bias,
                ctx.eps,
                ctx.activation,
                residual,
                mask,
                batch_statistics=ctx.batch_statistics,
            )
        return (
            dx,
            None if weight is None else dweight.to(weight.dtype),
            None if bias is None else dbias.to(bias.dtype),
            None if ctx.residual_dtype is None or dresidual is None else dresidual.to(ctx.residual_dtype),
            None,
            None,
            None,
            None,
        )


def normalize_with_batch(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    activation: str | None,
    residual: Tensor | None,
    mask: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | int]:
    """Normalise with the batch's own statistics; returns y, mean (C,), biased variance (C,) and the count."""
    # Torch's kernels know neither residual nor activation: there they follow as operations of their own.
    apart = mask is None and stock.supports(x, weight, bias)
    fused = (None, None) if apart else (residual, activation)
    y, mean, var, count = _BatchNorm.apply(x, weight, bias, fused[0], mask, None, eps, fused[1])  # type: ignore[no-untyped-call]
    if apart and residual is not None:
        y = y + residual.to(y.dtype)
    if apart and activation is not None:
        y = reference.ACTIVATIONS[activation].function(y)
    return y, mean, var, x.numel() // max(x.shape[1], 1) if count is None else count


def normalize_with(
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    activation: str | None,
    residual: Tensor | None,
    mask: Tensor | None,
) -> Tensor:
    """Normalise with running statistics, which are constants in backward."""
    dtype = reference.widened(x).dtype
    # Copies, since a training step may come between this and the backward.
    given = Moments(mean.to(dtype, copy=True), torch.zeros_like(mean, dtype=dtype), var.to(dtype, copy=True), 0)
    y, *_ = _BatchNorm.apply(x, weight, bias, residual, mask, given, eps, activation)  # type: ignore[no-untyped-call]
    return y  # type: ignore[no-any-return]
