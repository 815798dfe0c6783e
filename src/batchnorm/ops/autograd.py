"""The autograd Functions: one for calls of the native kernels, one for calls of the operators."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from batchnorm import torch_internals
from batchnorm.kernels import native
from batchnorm.kernels.plan import as_tensor
from batchnorm.kernels.records import Gradients, MomentsBuffer, Operands, Rule
from batchnorm.ops import chunks, operators
from batchnorm.ops.dispatch import is_native, is_unwatched, must_differentiate

__all__ = ["Backward", "backward_directly", "differentiable"]

DIFFERENTIABLE = ("x", "weight", "bias", "residual")
"""The operands that have gradients, in the order of `Gradients`."""

Backward = Callable[..., Sequence[Tensor | None]]
"""A function (dy, operands, moments, rule, *, y, wanted) of the signature of `native.backward`."""


def sign_of_activation(y: Tensor, residual: Tensor | None, activation: str | None) -> Tensor | None:
    """Return y where only its sign tells the sign of the activation's argument; without a residual x tells it."""
    return y if residual is not None and activation is not None else None


def _gradients(
    backward: Backward,
    dy: Tensor,
    operands: Operands,
    moments: Tensor | MomentsBuffer,
    rule: Rule,
    *,
    y: Tensor | None,
    needs: Sequence[bool],
) -> Sequence[Tensor | None]:
    """Return the gradients of x, weight, bias and residual that are needed."""
    passes_dy_on = y is None and needs[3]  # without an activation, dy is the residual's gradient
    wanted = (*needs[:3], False) if passes_dy_on else needs
    if must_differentiate(dy):
        backward = _backward_by_reference
    found = backward(dy, operands, moments, rule, y=y, wanted=wanted)
    if passes_dy_on:
        return (*found[:3], dy if operands.mask is None else torch.where(operands.mask.unsqueeze(1), dy, 0.0))
    return found


def _backward_by_reference(
    dy: Tensor,
    operands: Operands,
    moments: Tensor | MomentsBuffer,
    rule: Rule,
    *,
    y: Tensor | None = None,
    wanted: Sequence[bool],
) -> Sequence[Tensor | None]:
    """Compute the gradients in differentiable operations.

    A second derivative also runs through the batch's moments, so they are computed again where it sees them.
    """
    x, weight, bias, _, mask = operands
    if rule.training:
        batches = chunks.moments_of_chunks(x, mask, rule)
    else:
        batches = chunks.unpack(as_tensor(moments), x, mask, rule)
    gradients = chunks.backward(dy, operands, batches, rule, y=y)
    return [
        _in_dtype_of(like, gradient) if wants else None
        for gradient, like, wants in zip(gradients, (x, weight, bias, x), wanted, strict=False)
    ]


def _in_dtype_of(like: Tensor | None, gradient: Tensor) -> Tensor:
    return gradient if like is None or gradient.dtype == like.dtype else gradient.to(like.dtype)


def backward_directly(
    dy: Tensor,
    operands: Operands,
    moments: Tensor | MomentsBuffer,
    rule: Rule,
    *,
    y: Tensor | None = None,
    wanted: Sequence[bool],
) -> Gradients:
    """Call the native kernels, unless dy, or the tensors that hooks made of the saved ones, are not for them."""
    x, weight, bias, *_ = operands
    if not (is_unwatched() and native.are_unwrapped(dy, x, weight, bias, y) and is_native(x, y)):
        return _backward_by_operator(dy, operands, moments, rule, y=y, wanted=wanted)
    if not native.is_ready(x):
        operands = operands._replace(x=native.ready(x))
    return native.backward(dy, operands, moments, rule, y=y, wanted=wanted)


def _backward_by_operator(
    dy: Tensor,
    operands: Operands,
    moments: Tensor | MomentsBuffer,
    rule: Rule,
    *,
    y: Tensor | None = None,
    wanted: Sequence[bool],
) -> Gradients:
    packed = as_tensor(moments).view(chunks.moments_shape(operands.x, rule))
    return operators.backward(dy, operands, packed, rule, y=y, wanted=wanted)


class BatchNorm(torch.autograd.Function):
    """Attach gradients to a y that the native kernels have computed, in eager mode on CPU.

    torch calls the node, and what a profiler shows, by the name of the class.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None, made: tuple[Any, ...]
    ) -> Tensor:
        y: Tensor
        y, backward, moments, mask, rule = made  # one argument, because each argument of a Function takes its time
        ctx.kept = backward, moments, mask, rule
        ctx.save_for_backward(x, weight, bias, sign_of_activation(y, residual, rule.activation))
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, y = ctx.saved_tensors
        backward, moments, mask, rule = ctx.kept
        if torch_internals.count_dispatch_modes() != 0 or torch.compiler.is_compiling():  # by compiled autograd
            backward = _backward_by_operator
        operands = Operands._make((x, weight, bias, None, mask))  # in half the time of Operands(...)
        return (*_gradients(backward, dy, operands, moments, rule, y=y, needs=ctx.needs_input_grad), None)


@functools.cache
def _apply_direct() -> Callable[..., Any]:
    """Return the apply of `BatchNorm`, which is sought at the first call."""
    return torch_internals.fast_apply(BatchNorm)


def differentiable(
    y: Tensor, operands: Operands, backward: Backward, moments: Tensor | MomentsBuffer, rule: Rule
) -> Tensor:
    """Return y, computed by the native kernels, with its gradients."""
    x, weight, bias, residual, mask = operands
    return _apply_direct()(x, weight, bias, residual, (y, backward, moments, mask, rule))  # type: ignore[no-any-return]


def _save_forward(ctx: Any, given: dict[str, Any], results: tuple[Tensor, Tensor]) -> None:
    operands, (y, moments) = operators.take(Operands, given), results
    x, weight, bias, residual, mask = operands
    sign = sign_of_activation(y, residual, given["activation"])
    ctx.save_for_backward(x, weight, bias, sign, mask, moments, given["correction"])
    ctx.rule = operators.take(Rule, given, training=given["mean"] is None)._replace(correction=None)
    ctx.residual_dtype = None if residual is None else residual.dtype
    ctx.mark_non_differentiable(moments)


def _backward_of_forward(ctx: Any, needs: dict[str, bool], dy: Tensor, _: Tensor | None) -> dict[str, Tensor | None]:
    # They are unpacked once, because a checkpoint allows no more.
    x, weight, bias, y, mask, moments, correction = ctx.saved_tensors
    rule = ctx.rule._replace(correction=correction)
    *others, dresidual = _gradients(
        _backward_by_operator,
        dy,
        Operands(x, weight, bias, None, mask),
        moments,
        rule,
        y=y,
        needs=[needs[name] for name in DIFFERENTIABLE],
    )
    dresidual = None if dresidual is None else dresidual.to(ctx.residual_dtype)
    return dict(zip(DIFFERENTIABLE, (*others, dresidual), strict=True))


def _save_backward(ctx: Any, given: dict[str, Any], _: Any) -> None:
    operands = operators.take(Operands, given, residual=None)
    ctx.save_for_backward(given["dy"], *operands, given["y"], given["moments"], given["correction"])
    ctx.rule = operators.take(Rule, given)._replace(correction=None)
    ctx.wanted = given["wanted"]


def _backward_of_backward(ctx: Any, needs: dict[str, bool], *directions: Tensor | None) -> dict[str, Tensor | None]:
    dy, *operands, y, moments, correction = ctx.saved_tensors

    def gradients(dy: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Sequence[Tensor | None]:
        used, rule = Operands(x, weight, bias, None, operands[4]), ctx.rule._replace(correction=correction)
        return _backward_by_reference(dy, used, moments, rule, y=y, wanted=ctx.wanted)

    values = {"dy": dy, "x": operands[0], "weight": operands[1], "bias": operands[2]}
    return _differentiated(gradients, values, needs, directions)


def _save_moments(ctx: Any, given: dict[str, Any], _: Any) -> None:
    ctx.save_for_backward(given["x"], given["mask"])
    ctx.rule = operators.moments_rule(given)


def _backward_of_moments(ctx: Any, needs: dict[str, bool], direction: Tensor) -> dict[str, Tensor | None]:
    x, mask = ctx.saved_tensors
    return _differentiated(
        lambda x: [chunks.pack(chunks.moments_of_chunks(x, mask, ctx.rule))], {"x": x}, needs, [direction]
    )


def _differentiated(
    function: Callable[..., Sequence[Tensor | None]],
    values: dict[str, Tensor | None],
    needs: dict[str, bool],
    directions: Sequence[Tensor | None],
) -> dict[str, Tensor | None]:
    """Return the gradients that a function of differentiable operations has in these directions of its results."""
    again = torch.is_grad_enabled()
    with torch.enable_grad():
        # Views, so that a value that depends on another is a variable of its own.
        used = {name: value.view_as(value) for name, value in values.items() if value is not None and needs[name]}
        pairs = [
            (result, direction)
            for result, direction in zip(function(**(values | used)), directions, strict=True)
            if result is not None and result.requires_grad and direction is not None
        ]
        if not pairs:
            return {}
        results, given = zip(*pairs, strict=True)
        found = torch.autograd.grad(results, [*used.values()], given, create_graph=again, allow_unused=True)
    return dict(zip(used, found, strict=True))


operators.FORWARD.gradients(_backward_of_forward, _save_forward)
operators.BACKWARD.gradients(_backward_of_backward, _save_backward)
operators.MOMENTS.gradients(_backward_of_moments, _save_moments)
