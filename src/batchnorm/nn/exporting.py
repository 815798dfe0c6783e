"""Layers for tools that read models (tracers, exporters, TorchScript): they get torch's own operators."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from batchnorm import torch_internals
from batchnorm.errors import InputError, InputTypeError
from batchnorm.kernels.records import Operands, Rule, Running
from batchnorm.kernels.reference import ACTIVATIONS
from batchnorm.nn.options import Options
from batchnorm.torch_internals import TorchBatchNorm

__all__ = ["ScriptSource", "graph_reader", "in_torch_operators", "refuse_options", "scriptable", "traced"]

Reader = Literal["torch.jit.trace", "torch.export", "TorchScript"]

STOCK = Options(nonfinite="propagate")
"""The options that torch's layers have; a graph of them cannot skip batches that are not finite."""


def traced(path_of: Callable[[Any], str], x: Any, residual: Any, mask: Any) -> Any:
    """Return a call of the layer as one node of the graph that torch.fx traces.

    Parameters
    ----------
    path_of : callable
        Returns the module path of the layer for a tracer.
    x, residual, mask
        The arguments of the call.

    Raises
    ------
    InputTypeError
        x is neither a tensor nor a proxy of torch.fx.
    """
    fx = sys.modules.get("torch.fx")
    if fx is None or not isinstance(x, fx.Proxy):
        raise InputTypeError(f"input must be a tensor; got {type(x).__name__}")
    options = {name: value for name, value in (("residual", residual), ("mask", mask)) if value is not None}
    return x.tracer.create_proxy("call_module", path_of(x.tracer), (x,), options)


def graph_reader(compiling: bool) -> Reader | None:
    """Return the tool that reads this call and knows torch's own operators; None in nearly all calls."""
    if compiling:
        return "torch.export" if torch.compiler.is_exporting() else None
    return None if torch_internals.jit_tracing_state() is None else "torch.jit.trace"


def in_torch_operators(operands: Operands, running: Running, rule: Rule, dim: int) -> Tensor:
    """Compute a forward of a layer in torch's operators, of which exporters make a BatchNormalization.

    The operators check the sizes.

    Raises
    ------
    InputError
        There is a mask, and the statistics of the batch are used.
    """
    x, weight, bias, residual, mask = operands
    if rule.training and mask is not None:
        raise InputError(
            "mask must be None in a trace or export that uses batch statistics, since torch's batch normalization "
            "takes no mask; got a mask"
        )
    x = x if dim == 1 else x.movedim(dim, 1)
    wide = torch.float32 if x.dtype in (torch.float16, torch.bfloat16) else x.dtype
    weight, bias = (v if v is None or v.dtype == wide else v.to(wide) for v in (weight, bias))
    mean, var = running.mean, running.var
    momentum = 0.0
    if rule.training and running.update:
        assert running.batches is not None
        running.batches.add_(1)
        momentum = 1.0 / float(running.batches) if running.momentum is None else running.momentum
    elif rule.training:
        mean = var = None
    else:
        mean, var = (v if v is None or v.dtype == wide else v.to(wide) for v in (mean, var))
    y = F.batch_norm(x, mean, var, weight, bias, rule.training, momentum, rule.eps)
    if residual is not None:
        y = y + (residual if dim == 1 else residual.movedim(dim, 1))
    if rule.activation is not None:
        y = ACTIVATIONS[rule.activation].function(y)
    y = y if mask is None else torch.where(mask.unsqueeze(1), y, 0.0)
    return y if dim == 1 else y.movedim(1, dim)


def refuse_options(options: Options, reader: Reader) -> None:
    """Raise `InputError` if an option changes training, and torch's layers do not have it."""
    message = _refusal(options, reader)
    if message:
        raise InputError(message)


def _refusal(options: Options, reader: Reader) -> str:
    """Return why a layer cannot be trained in torch's operators; empty if it can."""
    for name in ("virtual_batch_size", "renorm", "sync", "small_batch", "unbiased"):
        value = getattr(options, name)
        if value != getattr(STOCK, name):
            return f"{reader} trains torch's layers, which do not have the option {name}; got {name}={value!r}"
    return ""


@dataclass(frozen=True)
class ScriptSource:
    """A layer as values, for its translation to TorchScript.

    Attributes
    ----------
    num_features : int
    weight, bias : Tensor or None
    running : Running
        With ``update`` where the layer tracks running statistics.
    rule : Rule
    options : Options
    training : bool
        The mode of the layer.
    frozen : bool
        Training mode uses the running statistics too.
    """

    num_features: int
    weight: Tensor | None
    bias: Tensor | None
    running: Running
    rule: Rule
    options: Options
    training: bool
    frozen: bool


class Scriptable(TorchBatchNorm):
    """A layer with the parameters and buffers of ours, written in what TorchScript can read."""

    def __init__(self, source: ScriptSource) -> None:
        running = source.running
        affine = source.weight is not None
        super().__init__(source.num_features, source.rule.eps, running.momentum, affine, running.update, device="meta")
        for name, value in (("weight", source.weight), ("bias", source.bias)):
            # A pruned weight is no parameter.
            self._parameters[name] = (
                value if value is None or isinstance(value, nn.Parameter) else nn.Parameter(value.detach())
            )
        self._buffers.update(running_mean=running.mean, running_var=running.var, num_batches_tracked=running.batches)
        self.activation = source.rule.activation or ""
        self.frozen = source.frozen
        self.refusal = _refusal(source.options, "TorchScript")
        self.train(source.training)

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:  # noqa: A002 (the layer's name for it)
        trains = self.training and not self.frozen
        if trains and len(self.refusal) > 0:
            raise RuntimeError(self.refusal)
        factor = 0.0
        if self.momentum is not None:
            factor = self.momentum
        if trains and self.track_running_stats and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            if self.momentum is None:
                factor = 1.0 / float(self.num_batches_tracked)
        mean, var = self.running_mean, self.running_var
        weight: Tensor | None = self.weight
        bias: Tensor | None = self.bias
        if trains and not self.track_running_stats:
            mean, var = None, None
        dtype = torch.float32 if input.dtype == torch.float16 or input.dtype == torch.bfloat16 else input.dtype
        if weight is not None:
            weight = weight.to(dtype)
        if bias is not None:
            bias = bias.to(dtype)
        y = F.batch_norm(input, mean, var, weight, bias, trains or mean is None, factor, self.eps)
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


def scriptable(source: ScriptSource) -> nn.Module:
    """Return torch's equivalent of a layer, for torch.jit.script.

    Raises
    ------
    InputError
        The layer has an option that torch's layers do not have, and that matters in its mode.
    """
    if source.options.channel_dim != STOCK.channel_dim:
        raise InputError(
            "TorchScript takes torch's layers, which do not have the option channel_dim; got "
            f"channel_dim={source.options.channel_dim}"
        )
    if source.training and not source.frozen:
        refuse_options(source.options, "TorchScript")
    return Scriptable(source)
