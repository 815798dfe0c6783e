"""The two layers of a tuned pair: one whose weight is folded in each forward, and the batch norm after it.

Frozen batch normalization is a linear function of each channel, which the layer before it can compute as well (You et
al., "Efficient ConvBN Blocks for Transfer Learning and Beyond", ICLR 2024)::

    gamma * (w * x + b - mean) / sqrt(var + eps) + beta  =  (scale * w) * x + (b - mean) * scale + beta
    with scale = gamma / sqrt(var + eps)

The products with scale are differentiated like the rest, so that all parameters get the gradients that they have in the
two layers. The backward needs no output of the convolution, and folds the weight again (`refolding`).

The layers refer to each other by attributes that are no submodules, so that all names stay. Both ask `_is_folded` at
each forward, which tells whether the first of them normalizes, or the batch norm does it as usual.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, fx, nn

from batchnorm.checks import check
from batchnorm.errors import UnsupportedError
from batchnorm.kernels.reference import ACTIVATIONS
from batchnorm.nn import exporting
from batchnorm.nn.buffers import context_of
from batchnorm.nn.layer import Layer
from batchnorm.nn.layout import arrange, dimension_of_channels, restore
from batchnorm.nn.reading import TOOL_SIGNS
from batchnorm.surgery.derived import derive, derive_beneath
from batchnorm.surgery.folding.arithmetic import Affine, Foldable, Weights, then
from batchnorm.surgery.tuning.refolding import can_refold, refolded
from batchnorm.surgery.tuning.tuned_pairs import end_tuning, link

__all__ = ["folded_forward", "tune_pair"]


class _WithWeights:
    """A module as its own forward sees it, but with another weight and bias."""

    def __init__(self, module: nn.Module, weight: Tensor, bias: Tensor) -> None:
        self.module, self.weight, self.bias = module, weight, bias

    def __getattr__(self, name: str) -> Any:
        return getattr(self.module, name)


def tune_pair(layer: nn.Module, norm: Layer) -> None:
    """Let a layer with a weight normalize too, with the running statistics of the batch norm that it alone feeds."""
    derive(layer, folding_its_weight)
    derive_beneath(norm, passing_on)
    link(layer, norm)


def _is_folded(layer: nn.Module, norm: Layer, dims: int) -> bool:
    """Return whether the layer normalizes its outputs of so many dimensions itself.

    It does not where other channels than its own are normalized, or where a context reads the inputs of the batch norm.
    """
    channels = norm.channel_dim
    if not -dims <= channels < dims or context_of(norm).hooks:
        return False
    if isinstance(layer, nn.Linear):
        return 0 < channels % dims == dims - 1
    return channels % dims == 1 and dims == len(layer.kernel_size) + 2  # type: ignore[arg-type]


def _affine(norm: Layer, dtype: torch.dtype) -> Affine:
    """Return the scale and shift of a frozen layer, in the wider of its dtype and that of a weight."""
    mean, var, _ = norm.statistics_in(context_of(norm))
    gamma, beta = norm.weight_and_bias()
    assert mean is not None
    assert var is not None
    wide = var.dtype if var.dtype.itemsize > dtype.itemsize else dtype
    scale = (var.to(wide) + norm.epsilon()).rsqrt()
    scale = scale if gamma is None else scale * gamma.to(wide)
    shift = -mean.to(wide) * scale
    return Affine(scale, shift if beta is None else beta.to(wide) + shift)


def folded_forward(kind: type[nn.Module], layer: Foldable, affine: Affine, *args: Any, **kwargs: Any) -> Tensor:
    """Return what the forward of a class computes for a layer with a scale and shift folded into its weight."""
    weight, bias = layer.weight, layer.bias
    wide = affine.scale.dtype
    weights = Weights(weight.to(wide), torch.zeros_like(affine.scale) if bias is None else bias.to(wide))
    folded = then(layer, weights, affine)
    view = _WithWeights(layer, folded.weight.to(weight.dtype), folded.bias.to(weight.dtype))
    return kind.forward(view, *args, **kwargs)  # type: ignore[no-any-return]


def folding_its_weight(base: type[nn.Module]) -> Mapping[str, Any]:
    """Return the methods of a layer that normalizes too."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        norm, x = self.tuned_norm, args[0] if args else kwargs.get("input")
        if isinstance(x, fx.Proxy) and norm is not None:
            return x.tracer.create_proxy("call_module", x.tracer.path_of_module(self), args, kwargs)  # type: ignore[attr-defined]
        if norm is None or not isinstance(x, Tensor) or not _is_folded(self, norm, x.dim()):
            return base.forward(self, *args, **kwargs)
        affine = _affine(norm, self.weight.dtype)
        if len(args) + len(kwargs) == 1 and can_refold(self, x):
            return refolded(self, x, affine)
        return folded_forward(base, self, affine, *args, **kwargs)

    def extra_repr(self: Any) -> str:
        return f"{base.extra_repr(self)}{'' if self.tuned_norm is None else ', tuned=True'}"

    methods = {"tuned_by": folding_its_weight, "tuned_norm": None, "forward": forward, "extra_repr": extra_repr}
    return {**methods, **_refusals(base, "tuned_norm")}


def passing_on(kind: type[nn.Module]) -> Mapping[str, Any]:
    """Return the methods of a batch norm whose input is normalized already."""
    base = cast("type[Layer]", kind)

    def forward(self: Any, input: Tensor, residual: Tensor | None = None, mask: Tensor | None = None) -> Tensor:  # noqa: A002
        layer = self.tuned_layer
        if layer is None:
            return base.forward(self, input, residual, mask)
        if not isinstance(input, Tensor):
            return exporting.traced(self, None, input, residual, mask)
        self._check_input_dim(input)
        if not _is_folded(layer, self, input.dim()):
            return base.forward(self, input, residual, mask)
        return _activated(self, input, residual, mask)

    def unfreeze(self: Any, *, statistics: bool = True, affine: bool = True) -> None:
        base.unfreeze(self, statistics=statistics, affine=affine)
        if statistics:
            end_tuning(self)

    def answer(self: Any, reader: str, names: set[str]) -> None:
        if self.tuned_layer is None:
            base._answer(self, reader, names)
        elif any(names >= sign for sign in TOOL_SIGNS):
            raise UnsupportedError(
                f"{reader} takes {base.__name__}({self.num_features}) for a layer that normalizes, which the layer "
                "before it does since batchnorm.tune; call batchnorm.unfreeze(model) first"
            )

    def extra_repr(self: Any) -> str:
        return f"{base.extra_repr(self)}{'' if self.tuned_layer is None else ', tuned=True'}"

    methods = {"forward": forward, "unfreeze": unfreeze, "_answer": answer, "extra_repr": extra_repr}
    return {"tuned_by": passing_on, "tuned_layer": None, **methods, **_refusals(base, "tuned_layer")}


def _activated(norm: Layer, x: Tensor, residual: Tensor | None, mask: Tensor | None) -> Tensor:
    """Return what follows normalization in a forward of the layer."""
    if residual is not None or mask is not None:
        dim = dimension_of_channels(x, norm.channel_dim)
        batch = arrange(x, residual, mask, dim)
        check(batch.x, batch.residual, batch.mask)
        y = batch.x if batch.residual is None else batch.x + batch.residual.to(x.dtype)
        counts = None if batch.mask is None else batch.mask.unsqueeze(1)
        y = y if counts is None else torch.where(counts, y, 0.0)  # before the activation, whose gradient may be NaN
        y = y if norm.activation is None else ACTIVATIONS[norm.activation].function(y)
        return restore(y if counts is None else torch.where(counts, y, 0.0), batch, dim)
    return x if norm.activation is None else ACTIVATIONS[norm.activation].function(x)


def _refusals(base: type[nn.Module], partner: str) -> dict[str, Any]:
    """Return the methods that stop tools which copy single layers."""

    def refused(self: Any, tool: str, method: str) -> Any:
        if getattr(self, partner) is not None:
            raise UnsupportedError(f"{tool} cannot copy a tuned layer; {method}")
        return self

    def prepare(self: Any) -> Any:
        refused(self, "TorchScript", "call batchnorm.unfreeze(model) first")
        return base.__prepare_scriptable__(self) if hasattr(base, "__prepare_scriptable__") else self

    def replicate(self: Any) -> Any:
        refused(self, "torch.nn.DataParallel", "use torch.nn.parallel.DistributedDataParallel")
        return base._replicate_for_data_parallel(self)  # type: ignore[no-untyped-call]

    return {"__prepare_scriptable__": prepare, "_replicate_for_data_parallel": replicate}
