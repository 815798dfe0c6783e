"""Which way a batch goes: straight to the native kernels, through the operators, or through the reference."""

from __future__ import annotations

import sys

import torch
from torch import Tensor
from torch.nn import Parameter

from batchnorm import torch_internals
from batchnorm.kernels import native
from batchnorm.kernels.chosen import cpu_kernel
from batchnorm.kernels.records import Operands, Rule, Running

__all__ = [
    "is_direct",
    "is_native",
    "is_sharded",
    "is_unwatched",
    "must_differentiate",
    "no_modes",
    "records_gradients",
]


def is_native(x: Tensor, like_x: Tensor | None = None) -> bool:
    """Return whether the native kernels take x, and ``like_x`` (a residual or an output) beside it."""
    return native.supports(x) and (like_x is None or like_x.dtype == x.dtype) and cpu_kernel() == "native"


def is_sharded(*tensors: Tensor | None) -> bool:
    """Return whether one of the tensors is a DTensor."""
    return any(_is_dtensor(values) for values in tensors if type(values) not in (Tensor, Parameter))


def _is_dtensor(values: Tensor | None) -> bool:
    distributed = sys.modules.get("torch.distributed.tensor")  # importing it takes half a second
    return distributed is not None and isinstance(values, distributed.DTensor)


def no_modes() -> bool:
    """Return whether neither a compiler nor a dispatch mode is active; either must see operators."""
    return not torch.compiler.is_compiling() and torch_internals.count_dispatch_modes() == 0


def is_unwatched() -> bool:
    """Return whether nothing records operators: no modes, no tracer before autograd, no torch.jit.trace.

    A plan's guards check the second, and a layer asks for the third before it runs a plan.
    """
    return no_modes() and not torch_internals.traces_pre_dispatch() and torch_internals.jit_tracing_state() is None


def records_gradients() -> bool:
    """Return whether autograd records operations."""
    return torch.is_grad_enabled() and not torch.is_inference_mode_enabled()


def must_differentiate(dy: Tensor) -> bool:
    """Return whether a backward must consist of operations that autograd, vmap and the like know."""
    return not torch.compiler.is_compiling() and (
        torch.is_grad_enabled()
        or torch_internals.transforms_are_active()  # not may_be_transformed(): each call costs a small batch time
        or torch_internals.forward_mode_is_active()
        or torch_internals.is_legacy_batched(dy)  # torch.autograd.grad(..., is_grads_batched=True)
    )


def is_direct(operands: Operands, running: Running, rule: Rule) -> bool:
    """Return whether a batch goes straight to the native kernels."""
    tensors = (*operands, running.mean, running.var, running.batches, running.skipped, rule.correction)
    return (
        is_unwatched()
        and not torch_internals.may_be_transformed()
        and native.are_unwrapped(*tensors)
        and is_native(operands.x, operands.residual)
        and native.can_update(running)
    )
