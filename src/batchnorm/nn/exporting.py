"""Layers in the hands of those who read models: tracers, exporters, TorchScript."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm as TorchBatchNorm

from batchnorm.errors import InputError
from batchnorm.kernels.reference import ACTIVATIONS
from batchnorm.nn.layout import dimension_of_channels
from batchnorm.nn.running import STATISTICS

if TYPE_CHECKING:
    from batchnorm.nn.layer import Layer

__all__ = ["in_torchs_operators", "portable", "scriptable", "traced"]


def traced(layer: nn.Module, x: Any, residual: Any, mask: Any) -> Any:
    """A call of the layer as one node of the graph that torch.fx is tracing.

    Raises
    ------
    InputError
        x is neither a tensor nor a proxy of torch.fx.
    """
    fx = sys.modules.get("torch.fx")
    if fx is None or not isinstance(x, fx.Proxy):
        raise InputError(f"input must be a tensor; got {type(x).__name__}")
    given = {name: value for name, value in (("residual", residual), ("mask", mask)) if value is not None}
    return x.tracer.create_proxy("call_module", x.tracer.path_of_module(layer), (x,), given)


def portable(layer: Layer) -> bool:
    """Whether the call is read by an exporter or torch.jit.trace, which know torch's own operators.

    A training graph of torch.export keeps the layer's own operators.
    """
    if torch._C._get_tracing_state() is not None:
        return True
    return torch.compiler.is_exporting() and (layer.frozen_statistics or not layer.training)


def in_torchs_operators(layer: Layer, x: Tensor, residual: Tensor | None, mask: Tensor | None) -> Tensor:
    """The layer's forward, of which exporters make a plain BatchNormalization; sizes are for the operators to check.

    Raises
    ------
    InputError
        The layer is in training mode and has an option that torch's has not, or there is a mask, and the batch's own
        statistics are used.
    """
    mean, var, batches = layer.running_statistics(layer.active_domain)
    learning = layer.training and not layer.frozen_statistics
    if learning:
        _refuse(layer, "torch.jit.trace")
    own = learning or mean is None
    if own and mask is not None:
        raise InputError(
            "a trace or export is made of torch's batch normalization, which takes no mask where it uses the batch's "
            "own statistics; got a mask"
        )
    dim = dimension_of_channels(x, layer.channel_dim)
    x = x if dim == 1 else x.movedim(dim, 1)
    wide = torch.float32 if x.dtype in (torch.float16, torch.bfloat16) else x.dtype
    weight, bias = (v if v is None or v.dtype == wide else v.to(wide) for v in layer.weight_and_bias())
    moving = learning and layer.track_running_stats and not layer._held
    momentum = 0.0
    if moving:
        assert batches is not None
        batches.add_(1)
        momentum = 1.0 / float(batches) if layer.momentum is None else layer.momentum
    elif learning:
        mean = var = None
    else:
        mean, var = (v if v is None or v.dtype == wide else v.to(wide) for v in (mean, var))
    y = F.batch_norm(x, mean, var, weight, bias, own, momentum, layer.eps)
    if residual is not None:
        y = y + (residual if dim == 1 else residual.movedim(dim, 1))
    if layer.activation is not None:
        y = ACTIVATIONS[layer.activation].function(y)
    y = y if mask is None else torch.where(mask.unsqueeze(1), y, 0.0)
    return y if dim == 1 else y.movedim(1, dim)


def _refuse(layer: Layer, reader: str) -> None:
    refused = _refusal(layer, reader)
    if refused:
        raise InputError(refused)


def _refusal(layer: Layer, reader: str) -> str:
    """Why a layer can't be trained in torch's operators; empty where it can."""
    options = {
        "virtual_batch_size": (layer.virtual_batch_size, None),
        "renorm": (layer.renorm, None),
        "sync": (layer.sync, False),
        "small_batch": (layer.small_batch, "raise"),
        "unbiased": (layer.unbiased, True),
    }
    for name, (value, torchs) in options.items():
        if value != torchs:
            return f"in training {reader} takes torch's layers alone, which know no {name}; got {name}={value!r}"
    return ""


class Scriptable(TorchBatchNorm):
    """The layer, with its parameters and buffers, in what TorchScript can read."""

    def __init__(self, layer: Layer) -> None:
        stock = layer.num_features, layer.eps, layer.momentum, layer.affine, layer.track_running_stats
        super().__init__(*stock, device="meta")
        for name, value in zip(("weight", "bias"), layer.weight_and_bias(), strict=True):
            taken = None if value is None else nn.Parameter(value.detach())  # pruned values are no parameter
            self._parameters[name] = value if isinstance(value, nn.Parameter) else taken
        held = zip(STATISTICS, layer.running_statistics(layer.active_domain), strict=True)
        self._buffers.update(held)
        self.activation = layer.activation or ""
        self.frozen = layer.frozen_statistics
        self.refusal = _refusal(layer, "TorchScript")
        self.train(layer.training)

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:  # noqa: A002 (the layer's name for it)
        learning = self.training and not self.frozen
        if learning and len(self.refusal) > 0:
            raise RuntimeError(self.refusal)
        factor = 0.0
        if self.momentum is not None:
            factor = self.momentum
        if learning and self.track_running_stats and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            if self.momentum is None:
                factor = 1.0 / float(self.num_batches_tracked)
        mean, var = self.running_mean, self.running_var
        weight: Tensor | None = self.weight
        bias: Tensor | None = self.bias
        if learning and not self.track_running_stats:
            mean, var = None, None
        dtype = torch.float32 if input.dtype == torch.float16 or input.dtype == torch.bfloat16 else input.dtype
        if weight is not None:
            weight = weight.to(dtype)
        if bias is not None:
            bias = bias.to(dtype)
        y = F.batch_norm(input, mean, var, weight, bias, learning or mean is None, factor, self.eps)
        if residual is not None:
            y = y + residual
        if self.activation == "relu":
            y = torch.relu(y)
        elif self.activation == "leaky_relu":
            y = F.leaky_relu(y, 0.01)
        elif self.activation == "silu":
            y = F.silu(y)
        elif self.activation == "gelu":
            y = F.gelu(y)
        elif self.activation == "tanh":
            y = torch.tanh(y)
        elif self.activation == "sigmoid":
            y = torch.sigmoid(y)
        return y


def scriptable(layer: Layer) -> nn.Module:
    """Torch's equal of the layer, for torch.jit.script.

    Raises
    ------
    InputError
        The layer has an option that torch's has not, and that counts in the mode it is in.
    """
    if layer.channel_dim != 1:
        raise InputError(
            f"TorchScript takes torch's layers alone, which know no channel_dim; got channel_dim={layer.channel_dim}"
        )
    if layer.training and not layer.frozen_statistics:
        _refuse(layer, "TorchScript")
    return Scriptable(layer)
