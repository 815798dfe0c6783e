"""A layer with a folded weight whose backward folds the weight again, so that no folded copy is kept until then.

With w the weight, s the scale of each output channel and W = s * w the folded weight, ``y = W * x + b`` has::

    dx = W^T * dy        dW = dy * x        dw = s dW        ds = sum(w dW) over each channel        db = sum(dy)

All steps are differentiable, for second derivatives.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from batchnorm import torch_internals
from batchnorm.surgery.derived import own_class
from batchnorm.surgery.folding.arithmetic import STOCK, TRANSPOSED, Affine, Foldable, Weights, then

__all__ = ["can_refold", "refolded"]

Sizes = tuple[int, ...]


def can_refold(layer: Foldable, x: Tensor) -> bool:
    """Return whether the backward of a call would keep a folded weight, and the formulas of this file serve it.

    Compilers decide themselves what they keep, and transforms and tracers need torch's own operators.
    """
    return (
        own_class(layer) in STOCK
        and (isinstance(layer, nn.Linear) or (layer.padding_mode == "zeros" and _padding(layer) is not None))
        and torch.is_grad_enabled()
        and type(x) is Tensor
        and type(layer.weight) in (Tensor, nn.Parameter)
        and not torch.compiler.is_compiling()
        and torch_internals.count_dispatch_modes() == 0
        and not torch_internals.may_be_transformed()
        and torch_internals.jit_tracing_state() is None
    )


def refolded(layer: Foldable, x: Tensor, affine: Affine) -> Tensor:
    """Return what a layer computes with a scale and shift folded into its weight and bias."""
    scale, shift = affine
    bias = shift if layer.bias is None else layer.bias.to(scale.dtype) * scale + shift
    dtype = layer.weight.dtype
    if torch.is_autocast_enabled(x.device.type) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(x.device.type)
        x = x.to(dtype)
    y: Tensor = _Refolded.apply(x, layer.weight, scale, bias, layer, dtype)  # type: ignore[no-untyped-call]
    return y


class _Refolded(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor, *call: Any) -> Tensor:
        ctx.save_for_backward(x, weight, scale)
        ctx.call = layer, dtype = call
        folded, bias = _scaled(layer, weight, scale).to(dtype), bias.to(dtype)
        if isinstance(layer, nn.Linear):
            return F.linear(x, folded, bias)
        return torch.convolution(x, folded, bias, *_settings(layer))

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        x, weight, scale = ctx.saved_tensors
        layer, dtype = ctx.call
        wanted = list(ctx.needs_input_grad[:4])
        of_x, of_weight = wanted[0], wanted[1] or wanted[2]
        # The values of the weight matter to the gradient of x alone.
        folded = (_scaled(layer, weight, scale) if of_x else weight).to(dtype)
        if isinstance(layer, nn.Linear):
            rows = dy.reshape(-1, dy.shape[-1])
            dx = dy @ folded if of_x else None
            product = rows.t() @ x.reshape(-1, x.shape[-1]) if of_weight else None
            dbias = rows.sum(0) if wanted[3] else None
        else:
            dx, product, dbias = torch.ops.aten.convolution_backward(
                dy, x, folded, [len(scale)], *_settings(layer), [of_x, of_weight, wanted[3]]
            )
        dscale = None
        if product is not None:
            product = product.to(scale.dtype)
            dscale = _dot_by_channel(layer, product, weight.to(scale.dtype)) if wanted[2] else None
            product = _scaled_gradient(layer, product, scale).to(weight.dtype) if wanted[1] else None
        return dx, product, dscale, None if dbias is None else dbias.to(scale.dtype), None, None


def _scaled(layer: Foldable, weight: Tensor, scale: Tensor) -> Tensor:
    """Return a weight times the scale of each output channel."""
    none = torch.zeros_like(scale)
    return then(layer, Weights(weight.to(scale.dtype), none), Affine(scale, none)).weight


def _scaled_gradient(layer: Foldable, product: Tensor, scale: Tensor) -> Tensor:
    """Return the gradient of the folded weight times the scale, in the same memory unless it is differentiated."""
    if torch.is_grad_enabled() or isinstance(layer, TRANSPOSED):
        return _scaled(layer, product, scale)
    return product.mul_(scale.view(-1, *[1] * (product.dim() - 1)))


def _dot_by_channel(layer: Foldable, product: Tensor, weight: Tensor) -> Tensor:
    """Return the sum over each output channel of the products of two tensors that are shaped like the weight."""
    values = product * weight
    if isinstance(layer, TRANSPOSED):
        return values.reshape(layer.groups, -1, values.shape[1], values[0, 0].numel()).sum((1, 3)).flatten()
    return values.flatten(1).sum(1)


def _settings(layer: Any) -> tuple[Sizes, Sizes, Sizes, bool, Sizes, int]:
    """Return the arguments of torch's convolution behind its tensors."""
    padding = _padding(layer)
    return layer.stride, padding, layer.dilation, isinstance(layer, TRANSPOSED), layer.output_padding, layer.groups  # type: ignore[return-value]


def _padding(layer: Any) -> Sizes | None:
    """Return the padding on both sides; None where the two sides differ."""
    if not isinstance(layer.padding, str):
        return layer.padding  # type: ignore[no-any-return]
    if layer.padding == "valid":
        return (0,) * len(layer.kernel_size)
    both = [step * (size - 1) for size, step in zip(layer.kernel_size, layer.dilation, strict=True)]
    return None if any(each % 2 for each in both) else tuple(each // 2 for each in both)
