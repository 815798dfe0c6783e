"""Fast path for repeated CPU calls: the checks of tensors are done once per input signature and cached as a plan.

With a small batch nearly all time goes into checks: of the type, dtype, size and layout of each tensor, whether it
takes gradients, whether a mode, a transform or a tracer is active. torch.compile makes the same checks with a guard in
C++, which tells whether tensors are like those that it was made of in all but their values and addresses: it compares
type, sizes, strides, dtype, requires_grad, and the dispatch keys, those of the thread included. It does not notice
modes that are hidden from compiled code, so callers check for modes beside it. The guard is private to torch: where it
does not behave as expected there are no plans, and every call makes its checks.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from batchnorm import torch_internals
from batchnorm.kernels import native
from batchnorm.kernels.call import CallLayout
from batchnorm.kernels.native import Statistics
from batchnorm.kernels.records import MomentsBuffer, Operands, Rule, Running

__all__ = ["Plan", "as_tensor", "can_plan"]

# Placeholders for missing tensors. Each slot needs its own, because TensorGuards rejects duplicates.
NO_WEIGHT, NO_BIAS, NO_OTHER, NO_MEAN, NO_VAR, NO_BATCHES, NO_SKIPPED = (torch.empty(0, device="cpu") for _ in range(7))


def can_plan() -> bool:
    """Return whether this torch can tell whether tensors are like others."""
    return torch_internals.tensor_guards() is not None


def _guard(tensors: Sequence[Tensor]) -> Callable[..., bool]:
    """Return a function that tells whether as many tensors are like these."""
    sizes, strides = [list(values.shape) for values in tensors], [list(values.stride()) for values in tensors]
    guards = torch_internals.tensor_guards()(*tensors, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides)
    check: Callable[..., bool] = guards.check
    return check


def _present(operands: Operands, statistics: Statistics) -> tuple[Tensor, ...]:
    x, weight, bias, residual, _ = operands
    mean, var, batches, skipped = statistics
    return (
        x,
        NO_WEIGHT if weight is None else weight,
        NO_BIAS if bias is None else bias,
        NO_OTHER if residual is None else residual,
        NO_MEAN if mean is None else mean,
        NO_VAR if var is None else var,
        NO_BATCHES if batches is None else batches,
        NO_SKIPPED if skipped is None else skipped,
    )


class Plan:
    """A plan for calls of `native.forward` without mask and renormalization, and for the backward after each.

    Its tensors are unwrapped, and the library reads them where they are. ``fallback`` is the backward for others.

    Attributes
    ----------
    rule : Rule
        That of the kernels.
    activation : str or None
        That of the layer, which the caller applies where the kernels don't.
    update_running : bool
        Whether a call updates the running statistics.
    differentiable : bool
        Whether a tensor takes a gradient.
    """

    def __init__(
        self,
        operands: Operands,
        running: Running,
        rule: Rule,
        fallback: Callable[..., Sequence[Tensor | None]],
        *,
        activation: str | None,
    ) -> None:
        self.rule, self.activation = rule, activation
        self.update_running = running.update
        self.differentiable = any(values is not None and values.requires_grad for values in operands)
        self._fallback = fallback
        layout = CallLayout.of(operands, running, rule)
        self._constants = layout.pack()
        self._var_offset = layout.var_offset
        self._buffer = ctypes.c_double * math.prod(layout.moments_shape)
        statistics = (running.mean, running.var, running.batches, running.skipped)
        self._fits = _guard(_present(operands, statistics))
        self._backward: tuple[Callable[..., bool], bytes] | None = None

    def forward(self, operands: Operands, statistics: Statistics) -> tuple[Tensor, MomentsBuffer] | None:
        """Return y and the moments, or None where the tensors are unlike those of the plan."""
        if not self._fits(*_present(operands, statistics)):
            return None
        buffer = self._buffer()
        mean = ctypes.addressof(buffer)
        return native.run_forward(self._constants, mean, mean + self._var_offset, operands, statistics, None), buffer

    def backward(
        self,
        dy: Tensor,
        operands: Operands,
        moments: MomentsBuffer,
        rule: Rule,
        *,
        y: Tensor | None = None,
        wanted: Sequence[bool],
    ) -> Sequence[Tensor | None]:
        """Do as `native.backward`; the checks of the first dy, and of tensors that hooks made of x, are kept."""
        x, weight, bias, _, _ = operands
        tensors = (
            dy,
            x,
            NO_WEIGHT if weight is None else weight,
            NO_BIAS if bias is None else bias,
            NO_OTHER if y is None else y,
        )
        if self._backward is not None:
            fits, constants = self._backward
            if fits(*tensors):
                mean = ctypes.addressof(moments)
                var = mean + self._var_offset
                return native.run_backward(constants, mean, var, dy, operands, None, y=y, wanted=wanted)
        if native.are_unwrapped(*tensors) and native.is_ready(x) and native.can_read(x, (dy, y), (weight, bias)):
            self._backward = _guard(tensors), CallLayout.of(operands, native.NO_RUNNING, rule).pack()
        return self._fallback(dy, operands, moments, rule, y=y, wanted=wanted)


def as_tensor(moments: Tensor | MomentsBuffer) -> Tensor:
    """Return the moments (2, C), those of chunks one after the other."""
    return moments if isinstance(moments, Tensor) else torch.frombuffer(moments, dtype=torch.float64).view(2, -1)
