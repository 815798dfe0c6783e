"""Transforms of torch.func and forward-mode differentiation, which need formulas made of differentiable operations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd import forward_ad

from batchnorm.torch_internals.lookup import FOUND, accessor, look_up

__all__ = [
    "forward_mode_is_active",
    "inside_vmap",
    "interpreter_stack",
    "is_functorch_wrapped",
    "is_legacy_batched",
    "is_transformed",
    "may_be_transformed",
    "obstacle_to_update",
    "transforms_are_active",
    "vmap_is_active",
]


def inside_vmap(tell: Callable[[Tensor], Any]) -> Any:
    """Return what ``tell`` returns of a tensor inside of vmap; vmap is the one transform that imports no compiler."""
    told = []

    def function(x: Tensor) -> Tensor:
        told.append(tell(x))
        return x

    torch.func.vmap(function)(torch.zeros(2))
    return told[0]


def _lists_levels(stack: Callable[[], Any]) -> bool:
    return not stack() and len(inside_vmap(lambda _: stack())) == 1


@accessor("torch._C._functorch.get_interpreter_stack", probe=_lists_levels)
def interpreter_stack() -> Sequence[Any] | None:
    """Return the active transforms of torch.func, None or empty if there are none; some where torch does not tell."""
    return (None,)


@accessor(
    "torch._C._are_functorch_transforms_active",
    probe=lambda active: active() is False and inside_vmap(lambda _: active()) is True,
)
def transforms_are_active() -> bool:
    """Return whether a transform of torch.func is active; True where torch does not tell."""
    return bool(interpreter_stack())


@accessor(
    "torch._C._functorch.TransformType",
    make=lambda kinds: lambda: any(level.key() == kinds.Vmap for level in interpreter_stack() or ()),
    probe=lambda active: active() is False and inside_vmap(lambda _: active()) is True,
)
def vmap_is_active() -> bool:
    """Return whether vmap is among the active transforms; False where torch does not tell."""
    return False


@accessor(
    "torch._C._functorch.is_functorch_wrapped_tensor",
    probe=lambda wrapped: wrapped(torch.zeros(1)) is False and inside_vmap(wrapped) is True,
)
def is_functorch_wrapped(values: Tensor) -> bool:
    """Return whether a transform has wrapped the tensor, as it does with the arguments of its function."""
    return torch.func.debug_unwrap(values) is not values


def _follows_dual_levels(active: Callable[[], bool]) -> bool:
    if active():  # another thread is in a dual level, and they do not nest
        return True
    with forward_ad.dual_level():
        inside = active()
    return inside and not active()


def _forward_mode_is_active() -> bool:
    return forward_ad._current_level >= 0


@accessor(
    "torch.autograd.forward_ad._current_level",
    make=lambda level: _forward_mode_is_active if type(level) is int else None,
    probe=_follows_dual_levels,
)
def forward_mode_is_active() -> bool:
    """Return whether forward-mode differentiation is active."""
    try:
        with forward_ad.dual_level():
            return False
    except RuntimeError:  # dual levels do not nest
        return True


def may_be_transformed() -> bool:
    """Return whether a transform or forward-mode differentiation may be active; torch.compile may trace this."""
    if torch.compiler.is_compiling():
        return _is_transformed_while_compiling()
    return transforms_are_active() or forward_mode_is_active()


def is_transformed() -> bool:
    """Return whether a transform or forward-mode differentiation is active; torch.compile may trace this.

    It differs from `may_be_transformed` where torch does not tell. Then the choice of formulas must assume a transform,
    and the update of running statistics must assume none.
    """
    if torch.compiler.is_compiling():
        return _is_transformed_while_compiling()
    if forward_mode_is_active():
        return True
    return transforms_are_active() and not FOUND.isdisjoint(("transforms_are_active", "interpreter_stack"))


def _is_transformed_while_compiling() -> bool:
    active = getattr(torch._C, "_are_functorch_transforms_active", None)
    return (active is not None and active()) or getattr(forward_ad, "_current_level", -1) >= 0


def _tells_batches(batched: Callable[[Tensor], bool]) -> bool:
    told = [batched(torch.zeros(1))]

    def tell(dy: Tensor) -> Tensor:
        told.append(batched(dy))
        return dy

    # torch.autograd.grad(..., is_grads_batched=True) does this, but it also imports SymPy, for half a second.
    look_up("torch._vmap_internals._vmap")(tell)(torch.ones(2, 1))
    return told == [False, True]


@accessor(
    "torch._C._functorch.is_legacy_batchedtensor",
    "torch._vmap_internals._vmap",
    make=lambda batched, _: batched,
    probe=_tells_batches,
)
def is_legacy_batched(values: Tensor) -> bool:
    """Return whether the tensor stands for a batch of gradients (``is_grads_batched=True``); True where unknown."""
    return True


Obstacle = Literal["unmapped", "captured"]


def _levels_of(level_of: Callable[[Tensor], int], unwrapped: Callable[[Tensor], Tensor], values: Tensor) -> set[int]:
    """Return the levels of the transforms that have wrapped the tensor."""
    levels = set()
    while (level := level_of(values)) > 0:
        levels.add(level)
        values = unwrapped(values)
    return levels


def _make_obstacle(
    level_of: Callable[[Tensor], int], unwrapped: Callable[[Tensor], Tensor], stack: Callable[[], Sequence[Any] | None]
) -> Callable[[Tensor | None, Tensor | None], Obstacle | None]:
    def obstacle(values: Tensor | None, new: Tensor | None) -> Obstacle | None:
        active = {level.level(): level.key().name for level in stack() or ()}
        mapped = active.keys() if new is None else _levels_of(level_of, unwrapped, new)
        outside = active.keys() - (set() if values is None else _levels_of(level_of, unwrapped, values))
        if any(active[level] == "Vmap" and level in mapped for level in outside):
            return "unmapped"
        if any(active[level] in ("Grad", "Jvp", "Functionalize") for level in outside):
            return "captured"
        if forward_mode_is_active() and "Jvp" not in active.values():
            return "captured"
        return "captured" if values is None and active else None

    return obstacle


def _tells_obstacles(obstacle: Callable[[Tensor | None, Tensor | None], Obstacle | None]) -> bool:
    # Forward mode is the one transform that all threads share, so this may be tried within a jvp.
    plain = "captured" if forward_mode_is_active() else None
    zero = torch.zeros(1)
    told = inside_vmap(lambda x: (obstacle(x, x), obstacle(zero, x), obstacle(zero, zero), obstacle(None, x)))
    return told == (plain, "unmapped", plain, "unmapped") and obstacle(zero, zero) == plain


@accessor(
    "torch._C._functorch.maybe_get_level",
    "torch._C._functorch.get_unwrapped",
    "torch._C._functorch.get_interpreter_stack",
    make=_make_obstacle,
    probe=_tells_obstacles,
)
def obstacle_to_update(values: Tensor | None, new: Tensor | None) -> Obstacle | None:
    """Return why the active transforms forbid to write new values to a tensor in place; None if they do not.

    ``"unmapped"``: vmap maps over the new values, and not over the tensor. ``"captured"``: the tensor is no argument of
    a function that grad, jvp or forward mode differentiates, or that is functionalized. None stands for values outside
    of all transforms, and for new values that depend on all. Where torch does not tell levels apart, being wrapped by
    any is enough.
    """
    if values is not None and is_functorch_wrapped(values):
        return None
    return "unmapped" if vmap_is_active() else "captured"
