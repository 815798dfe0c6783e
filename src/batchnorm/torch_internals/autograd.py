"""The state of autograd, and two shortcuts through it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import profiler

from batchnorm.torch_internals import lookup
from batchnorm.torch_internals.lookup import PATHS, accessor, itself, works

__all__ = ["fast_apply", "graph_task_id", "has_saved_tensors_hooks", "profiler_is_active"]


def _nothing() -> None:
    pass


def _graph_task_in_hook(task: Callable[[], int]) -> int:
    """Return the result of ``task`` inside a backward."""
    told: list[int] = []
    x = torch.ones(1, requires_grad=True)
    y = x * 1
    y.register_hook(lambda _: told.append(task()))  # type: ignore[no-untyped-call]
    y.backward()  # type: ignore[no-untyped-call]
    return told[0]


@accessor(
    "torch._C._current_graph_task_id",
    probe=lambda task: task() == -1 and _graph_task_in_hook(task) >= 0,
)
def graph_task_id() -> int:
    """Return -1 outside of a backward; inside, where activation checkpointing runs forwards again, a number from 0."""
    engine = getattr(torch.autograd.Variable, "_execution_engine", None)
    if engine is None:
        return -1  # then activation checkpointing counts a batch twice, as with torch's layers
    try:
        engine.queue_callback(_nothing)  # the engine takes a callback only while it runs a backward
    except RuntimeError:
        return -1
    return 0


def _sees_hooks(on_top: Callable[[], bool]) -> bool:
    outside = on_top()
    with torch.autograd.graph.saved_tensors_hooks(itself, itself):
        return on_top() is True and outside is False


@accessor(
    "torch._C._autograd._top_saved_tensors_default_hooks",
    make=lambda top: lambda: top(True) is not None,
    probe=_sees_hooks,
)
def has_saved_tensors_hooks() -> bool:
    """Return whether hooks pack the tensors saved for backward, as checkpointing does; True where unknown."""
    return True


def _profiler_is_active() -> bool:
    return profiler._is_profiler_enabled


@accessor(
    "torch.autograd.profiler._is_profiler_enabled",
    make=lambda enabled: _profiler_is_active if type(enabled) is bool else None,
    probe=lambda active: type(active()) is bool,
)
def profiler_is_active() -> bool:
    """Return whether a profiler records; True where torch does not tell, and a record is made in vain."""
    return True


class _Shortcut:
    """A function of autograd that the shortcuts are tried on; made anew for each, since one of them changes it."""

    @staticmethod
    def new() -> type[torch.autograd.Function]:
        class Scaled(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, x: Tensor, other: Tensor | None, factor: float) -> Tensor:
                ctx.save_for_backward(x, other)
                ctx.factor = factor
                return x * factor

            @staticmethod
            def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
                x, other = ctx.saved_tensors
                assert other is None
                return dy * x * ctx.factor, None, None

        return Scaled

    @staticmethod
    def works(apply: Callable[..., Tensor]) -> bool:
        """Return whether y, the gradient and the name of the node are right."""
        x = torch.tensor([5.0], requires_grad=True)
        y = apply(x, None, 3.0)
        node = y.grad_fn
        y.backward()  # type: ignore[no-untyped-call]
        return (
            y.item() == 15.0
            and x.grad is not None
            and x.grad.item() == 15.0
            and node is not None
            and node.name() == "ScaledBackward"
        )


_SINGLE_LEVEL = "torch.autograd.function._SingleLevelFunction"
_BACKWARD_CLASS = "torch.autograd.Function._backward_cls"
PATHS["fast_apply"] = (_SINGLE_LEVEL, _BACKWARD_CLASS)


def _raw_apply(function: type[torch.autograd.Function]) -> Callable[..., Any]:
    """Return the apply of C++ below torch's search for wrapped arguments."""
    return super(lookup.look_up(_SINGLE_LEVEL), function).apply  # type: ignore[no-any-return]


def _shorten_backward(function: type[torch.autograd.Function]) -> None:
    """Let the engine call backward without torch's search for its other forms."""
    if not callable(lookup.look_up(_BACKWARD_CLASS).apply):
        raise TypeError("the class that runs a backward must have an apply to replace")
    function._backward_cls.apply = function.backward  # type: ignore[attr-defined]


@functools.cache
def _shortcuts() -> tuple[bool, bool]:
    """Return whether the raw apply works, and whether backward can be shortened."""

    def backward_works() -> bool:
        function = _Shortcut.new()
        _shorten_backward(function)
        return _Shortcut.works(function.apply)

    return works(lambda: _Shortcut.works(_raw_apply(_Shortcut.new()))), works(backward_works)


def fast_apply(function: type[torch.autograd.Function]) -> Callable[..., Any]:
    """Shorten the backward of an autograd Function, and return its apply without a search for wrapped arguments.

    Both searches take a tenth of a small batch's time. The function must define ``backward``, and be applied only where
    no transform of torch.func is active. Keep the result: finding it takes time. Where torch does not work as known
    here it is ``function.apply``.
    """
    raw, backward = _shortcuts()
    if backward:
        _shorten_backward(function)
    return _raw_apply(function) if raw else function.apply
