"""Calls of the CPU kernels that are like an earlier one: what was asked of its tensors is not asked again.

With a small batch nearly all time goes into questions: of which type, dtype, size and layout each tensor is, whether it
takes gradients, whether a mode, a transform or a tracer watches. torch.compile asks them too, of a function in C++ that
tells whether tensors are like those that it was made of in all but their values and where they are: it compares type,
sizes, strides, dtype, requires_grad, and the keys by which torch would dispatch a call, those of the thread included;
but those of modes only of such as compiled code is to see, so whether there are any is asked beside it.
It is private to torch: where it is not as it is known here there are no plans, and every call asks anew.
"""

from __future__ import annotations

import ctypes
import importlib
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from batchnorm.kernels import native
from batchnorm.kernels.native import CallLayout
from batchnorm.kernels.records import MomentsBuffer, Operands, Rule, Running, Saved

__all__ = ["Plan", "as_tensor", "can_plan"]

# Stand for tensors that are not there: each for one, since the same tensor twice is like nothing.
NO_WEIGHT, NO_BIAS, NO_OTHER, NO_MEAN, NO_VAR, NO_BATCHES, NO_SKIPPED = (torch.empty(0, device="cpu") for _ in range(7))


def _guards() -> Any:
    """torch.compile's TensorGuards; None where this torch has none that works as is known here."""
    one, other = torch.empty(1, device="cpu"), torch.empty(2, device="cpu")
    try:
        guards: Any = importlib.import_module("torch._C._dynamo.guards").TensorGuards
        fits = guards(one, dynamic_dims_sizes=[[1]], dynamic_dims_strides=[[1]]).check
        return guards if fits(one) and not fits(other) else None
    except (ImportError, AttributeError, TypeError, RuntimeError):
        return None


_Guards = _guards()


def can_plan() -> bool:
    """Whether this torch can tell whether tensors are like others."""
    return _Guards is not None


def _guard(tensors: Sequence[Tensor]) -> Callable[..., bool]:
    """Whether as many tensors are like these."""
    sizes, strides = [list(values.shape) for values in tensors], [list(values.stride()) for values in tensors]
    check: Callable[..., bool] = _Guards(*tensors, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides).check
    return check


def _present(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    batches: Tensor | None,
    skipped: Tensor | None,
) -> tuple[Tensor, ...]:
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
    """Of a call of `native.forward` without mask and renormalization, and of the backward after it.

    Its tensors are plain ones, and such as the library reads where they are. ``otherwise`` is the backward of tensors
    that are others.
    """

    def __init__(
        self,
        operands: Operands,
        running: Running,
        rule: Rule,
        otherwise: Callable[[Tensor, Saved, Sequence[bool]], Sequence[Tensor | None]],
    ) -> None:
        x, weight, bias, residual, _ = operands
        mean, var, batches, _, skipped, _, self.update = running
        self.rule = rule
        self._otherwise = otherwise
        self.differentiable = any(values is not None and values.requires_grad for values in (x, weight, bias, residual))
        self._layout = native.layout_of(operands, running, rule)
        self._buffer = ctypes.c_double * math.prod(self._layout.moments)
        self._fits = _guard(_present(x, weight, bias, residual, mean, var, batches, skipped))
        self._back: tuple[Callable[..., bool], CallLayout] | None = None

    def forward(
        self,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        mean: Tensor | None,
        var: Tensor | None,
        batches: Tensor | None,
        skipped: Tensor | None,
    ) -> tuple[Tensor, MomentsBuffer] | None:
        """Return y and the moments, where the tensors are like those of the plan."""
        if not self._fits(*_present(x, weight, bias, residual, mean, var, batches, skipped)):
            return None
        buffer = self._buffer()
        at = ctypes.addressof(buffer)
        y = native.run_forward(self._layout, at, x, weight, bias, residual, None, mean, var, batches, skipped, None)
        return y, buffer

    def backward(self, dy: Tensor, saved: Saved, wanted: Sequence[bool]) -> Sequence[Tensor | None]:
        """As `native.backward`; what it found out of the first dy, and of what hooks made of x, is kept."""
        operands, y, buffer, rule = saved
        x, weight, bias, _, mask = operands
        tensors = (
            dy,
            x,
            NO_WEIGHT if weight is None else weight,
            NO_BIAS if bias is None else bias,
            NO_OTHER if y is None else y,
        )
        if self._back is not None:
            fits, layout = self._back
            if fits(*tensors):
                at = ctypes.addressof(buffer)  # type: ignore[arg-type]
                return native.run_backward(layout, at, dy, x, weight, bias, y, mask, None, wanted=wanted)
        if native.are_unwrapped(*tensors) and native.is_ready(x) and native.can_read(x, (dy, y), (weight, bias)):
            self._back = _guard(tensors), native.layout_of(operands, native.NOTHING, rule)
        return self._otherwise(dy, saved, wanted)


def as_tensor(moments: Tensor | MomentsBuffer) -> Tensor:
    """The moments (2, C), those of chunks one after the other."""
    return moments if isinstance(moments, Tensor) else torch.frombuffer(moments, dtype=torch.float64).view(2, -1)
