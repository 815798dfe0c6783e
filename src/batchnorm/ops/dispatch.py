"""Which way a batch goes: straight to the native kernels, through the operators, or through the reference."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad

from batchnorm.kernels import native
from batchnorm.kernels.chosen import cpu_kernel
from batchnorm.kernels.records import Operands, Rule, Running

__all__ = [
    "dispatch_modes",
    "is_direct",
    "is_native",
    "is_unwatched",
    "must_differentiate",
    "no_modes",
    "records_gradients",
    "transformed",
]

dispatch_modes = torch._C._len_torch_dispatch_stack
_PRE_DISPATCH = torch._C.DispatchKey.PreDispatch


def is_native(x: Tensor, like_x: Tensor | None = None) -> bool:
    """Return whether the native kernels take x, and ``like_x`` (a residual or an output) beside it."""
    return native.supports(x) and (like_x is None or like_x.dtype == x.dtype) and cpu_kernel() == "native"


def transformed() -> bool:
    """Return whether a transform of torch.func or forward-mode differentiation is active."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def no_modes() -> bool:
    """Return whether neither a compiler nor a dispatch mode is active; either must see operators."""
    return not torch.compiler.is_compiling() and dispatch_modes() == 0


def is_unwatched() -> bool:
    """Return whether there are `no_modes` and no tracer that runs before autograd; a plan's guards check the latter."""
    return no_modes() and not torch._C._dispatch_tls_is_dispatch_key_included(_PRE_DISPATCH)


def records_gradients() -> bool:
    """Return whether autograd records operations."""
    return torch.is_grad_enabled() and not torch.is_inference_mode_enabled()


def must_differentiate(dy: Tensor) -> bool:
    """Return whether a backward must consist of operations that autograd, vmap and the like know."""
    return not torch.compiler.is_compiling() and (
        torch.is_grad_enabled()
        or transformed()
        or torch._C._functorch.is_legacy_batchedtensor(dy)  # torch.autograd.grad(..., is_grads_batched=True)
    )


def is_direct(operands: Operands, running: Running, rule: Rule) -> bool:
    """Return whether a batch goes straight to the native kernels."""
    tensors = (*operands, running.mean, running.var, running.batches, running.skipped, rule.correction)
    return (
        is_unwatched()
        and not transformed()
        and native.are_unwrapped(*tensors)
        and is_native(operands.x, operands.residual)
        and native.can_update(running)
    )
