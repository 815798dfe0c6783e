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
from batchnorm.kernels.records import Gradients, MomentsBuffer, Operands, Rule, Running
from batchnorm.ops import chunks, operators
from batchnorm.ops.dispatch import is_native, is_unwatched, must_differentiate

__all__ = ["Backward", "backward_directly", "differentiable", "differentiable_by_operators"]

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
    found: Sequence[Tensor | None]
    if must_differentiate(dy):
        # A second derivative also runs through the batch's moments, so they are computed again where it sees them.
        x, mask = operands.x, operands.mask
        if rule.training:
            batches = chunks.moments_of_chunks(x, mask, rule)
        else:
            batches = chunks.unpack(as_tensor(moments), x, mask, rule)
        gradients = chunks.backward(dy, operands, batches, rule, y=y)
        found = [
            _in_dtype_of(like, gradient) if wants else None
            for gradient, like, wants in zip(gradients, (x, operands.weight, operands.bias, x), wanted, strict=False)
        ]
    else:
        found = backward(dy, operands, moments, rule, y=y, wanted=wanted)
    if passes_dy_on:
        return (*found[:3], dy if operands.mask is None else torch.where(operands.mask.unsqueeze(1), dy, 0.0))
    return found


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
    return operators.backward(dy, operands, as_tensor(moments), rule, y=y, wanted=wanted)


class _DirectFunction(torch.autograd.Function):
    """Attach gradients to a y that the native kernels have computed, in eager mode on CPU."""

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
        if torch_internals.count_dispatch_modes() != 0:
            backward = _backward_by_operator
        operands = Operands._make((x, weight, bias, None, mask))  # in half the time of Operands(...)
        return (*_gradients(backward, dy, operands, moments, rule, y=y, needs=ctx.needs_input_grad), None)


@functools.cache
def _apply_direct() -> Callable[..., Any]:
    """Return the apply of `_DirectFunction`, which is sought at the first call."""
    return torch_internals.fast_apply(_DirectFunction)


def differentiable(
    y: Tensor, operands: Operands, backward: Backward, moments: Tensor | MomentsBuffer, rule: Rule
) -> Tensor:
    """Return y, computed by the native kernels, with its gradients."""
    x, weight, bias, residual, mask = operands
    return _apply_direct()(x, weight, bias, residual, (y, backward, moments, mask, rule))  # type: ignore[no-any-return]


class _OperatorFunction(torch.autograd.Function):
    """The forward operator with its gradients; it also returns the moments, which update the running statistics."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        mask: Tensor | None,
        mean: Tensor | None,
        var: Tensor | None,
        correction: Tensor | None,
        rule: tuple[Any, ...],
    ) -> tuple[Tensor, Tensor]:
        whole = Rule(*rule)._replace(correction=correction)
        y, moments = operators.forward(Operands(x, weight, bias, residual, mask), Running(mean, var), whole)
        sign = sign_of_activation(y, residual, whole.activation)
        ctx.save_for_backward(x, weight, bias, sign, mask, moments, correction)
        ctx.rule = rule
        ctx.residual_dtype = None if residual is None else residual.dtype
        ctx.mark_non_differentiable(moments)
        return y, moments

    @staticmethod
    def backward(ctx: Any, dy: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
        # They are unpacked once, because a checkpoint allows no more.
        x, weight, bias, y, mask, moments, correction = ctx.saved_tensors
        rule = Rule(*ctx.rule)._replace(correction=correction)
        operands = Operands(x, weight, bias, None, mask)
        *others, dresidual = _gradients(
            _backward_by_operator, dy, operands, moments, rule, y=y, needs=ctx.needs_input_grad
        )
        dresidual = None if dresidual is None else dresidual.to(ctx.residual_dtype)
        return (*others, dresidual, *(None,) * 5)


def differentiable_by_operators(operands: Operands, running: Running, rule: Rule) -> tuple[Tensor, Tensor]:
    """Return y and the packed moments, computed by the forward operator, with the gradients of y."""
    given = (None, None) if rule.training else (running.mean, running.var)
    constants = tuple(rule._replace(correction=None, limits=None))
    return _OperatorFunction.apply(*operands, *given, rule.correction, constants)  # type: ignore[no-untyped-call, no-any-return]
