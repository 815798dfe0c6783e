"""Layers for tools that record calls (tracers and exporters): they get torch's own operators."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.prune import BasePruningMethod

from batchnorm import torch_internals
from batchnorm.errors import InputError, InputTypeError, UnsupportedError, warn
from batchnorm.kernels.records import Operands, Rule, Running
from batchnorm.kernels.reference import ACTIVATIONS
from batchnorm.nn.contexts import LayerContext
from batchnorm.nn.options import Options

__all__ = [
    "STOCK",
    "Reader",
    "graph_reader",
    "in_torch_operators",
    "is_torchs",
    "refusal",
    "refuse_context",
    "refuse_options",
    "traced",
]

Reader = Literal["torch.jit.trace", "torch.export", "TorchScript"]

STOCK = Options(nonfinite="propagate")
"""The options that torch's layers have; a graph of them cannot skip batches that are not finite."""


def traced(layer: nn.Module, base: Callable[..., Tensor] | None, x: Any, residual: Any, mask: Any) -> Any:
    """Return a call of a layer's forward as part of the graph that torch.fx traces.

    Parameters
    ----------
    layer : Module
    base : callable or None
        None: the call becomes one node, which calls the module. A subclass with a forward of its own is traced through,
        and comes here by ``super().forward``. There a call of the module would do the rest of its forward twice, so
        that ``base(layer, input, residual, mask)`` is recorded instead.
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
    tracer = x.tracer
    path = tracer.path_of_module(layer)
    options = {name: value for name, value in (("residual", residual), ("mask", mask)) if value is not None}
    if base is None:
        hooks = [*layer._forward_pre_hooks.values(), *layer._forward_hooks.values()]
        if any(not isinstance(hook, BasePruningMethod) for hook in hooks):
            warn(
                f"torch.fx records what the hooks of {path} return, and the graph calls them once more with the layer; "
                "remove hooks that return a value before tracing"
            )
        return tracer.create_proxy("call_module", path, (x,), options)
    module = tracer.create_proxy("get_attr", path, (), {})
    return tracer.create_proxy("call_function", base, (module, x), options)


def graph_reader(compiling: bool) -> Reader | None:
    """Return the tool that reads this call and knows torch's own operators; None in nearly all calls."""
    if compiling:
        return "torch.export" if torch_internals.is_exporting() else None
    return None if torch_internals.jit_tracing_state() is None else "torch.jit.trace"


def is_torchs(operands: Operands, running: Running, rule: Rule) -> bool:
    """Return whether torch's batch normalization normalizes this training batch, and updates its statistics, as we do.

    A batch that is not finite is the exception: torch's operator does not skip it.
    """
    mean = running.mean
    return (
        operands.mask is None
        and rule.chunks == 1
        and rule.limits is None
        and (not running.update or (running.unbiased and running.momentum is not None))
        and (mean is None or mean.dtype == _wide(operands.x))
    )


def _wide(x: Tensor) -> torch.dtype:
    """Return the dtype that parameters and statistics have beside x in torch's operator."""
    return torch.float32 if x.dtype in (torch.float16, torch.bfloat16) else x.dtype


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
    wide = _wide(x)
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
    message = refusal(options, reader)
    if message:
        raise InputError(message)


def refuse_context(context: LayerContext, reader: Reader, *, trains: bool = False) -> None:
    """Raise `UnsupportedError` within a context that calls Python at each forward, which no graph of torch's can."""
    if context.hooks:
        raise UnsupportedError(
            f"{reader} cannot record a forward that is adapted to each batch or measured; adapt to a loader, or record "
            "outside of the context"
        )
    if trains and context.pool is not None:
        raise UnsupportedError(f"{reader} cannot record a forward within batchnorm.accumulate; record outside of it")


def refusal(options: Options, reader: Reader) -> str:
    """Return why a layer cannot be trained in torch's operators; empty if it can."""
    for name in ("virtual_batch_size", "renorm", "sync", "small_batch", "unbiased"):
        value = getattr(options, name)
        if value != getattr(STOCK, name):
            return f"{reader} trains torch's layers, which do not have the option {name}; got {name}={value!r}"
    return ""
