"""Batch normalization as a differentiable operation on tensors.

In plain eager mode a CPU batch goes straight to the native kernels, which also move the running statistics. Under
torch.compile, export, fake tensors and dispatch modes, and on other devices, it goes through the operators
``batchnorm::forward`` and ``batchnorm::backward``, so that a compiled graph keeps each as one node. Transforms of
torch.func, and second derivatives, take the reference, which is made of differentiable operations.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from batchnorm.errors import InputError
from batchnorm.kernels import native, reference
from batchnorm.kernels.chosen import cpu_kernel
from batchnorm.kernels.native import Running
from batchnorm.kernels.reference import ACTIVATIONS, Moments, at_least_one

__all__ = ["Running", "batch_norm"]

_LIBRARY = torch.library.Library("batchnorm", "DEF")  # type: ignore[no-untyped-call]
for _schema in (
    "forward(Tensor x, Tensor? mean, Tensor? var, Tensor? weight, Tensor? bias, Tensor? residual, Tensor? mask, "
    "float eps, str? activation) -> (Tensor y, Tensor moments)",
    "backward(Tensor dy, Tensor x, Tensor moments, Tensor? weight, Tensor? bias, Tensor? y, Tensor? mask, float eps, "
    "str? activation, bool training, bool[] wanted) -> (Tensor dx, Tensor dweight, Tensor dbias, Tensor dresidual)",
):
    _LIBRARY.define(_schema, tags=(torch.Tag.pt2_compliant_tag,))  # type: ignore[no-untyped-call]


def _is_native(x: Tensor, residual: Tensor | None) -> bool:
    return native.supports(x) and (residual is None or residual.dtype == x.dtype) and cpu_kernel() == "native"


def _packed(moments: Moments) -> Tensor:
    return torch.stack((moments.mean, moments.var))


def _unpacked(moments: Tensor, x: Tensor, mask: Tensor | None) -> Moments:
    return Moments(moments[0], moments[1], reference.count_of(x, mask))


def _forward(
    x: Tensor,
    mean: Tensor | None,
    var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mask: Tensor | None,
    eps: float,
    activation: str | None,
) -> tuple[Tensor, Tensor]:
    """The operator: with mean and var given they are used, else the batch's own."""
    _check_sizes(x, mean, var, weight, bias)
    if (mean is None) != (var is None):
        raise InputError("mean and var must be given both or neither; got one")
    x = native.ready(x)
    if _is_native(x, residual):
        running = Running(mean, var, None, 0.0)
        training = mean is None
        y, moments, _ = native.forward(x, weight, bias, residual, mask, running, eps, activation, training)
        return y, moments
    used = reference.moments(x, mask) if mean is None or var is None else _given(x, mean, var)
    return reference.forward(x, used, weight, bias, eps, activation, residual, mask), _packed(used)


def _check_sizes(x: Tensor, *per_channel: Tensor | None) -> None:
    for values in per_channel:
        if values is not None and values.shape != x.shape[1:2]:
            raise InputError(f"each channel of x, {tuple(x.shape)}, must have one number; got {tuple(values.shape)}")


def _given(x: Tensor, mean: Tensor, var: Tensor) -> Moments:
    dtype = reference.statistics_dtype(x)
    return Moments(mean.to(dtype), var.to(dtype), 0)


def _backward(
    dy: Tensor,
    x: Tensor,
    moments: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    y: Tensor | None,
    mask: Tensor | None,
    eps: float,
    activation: str | None,
    training: bool,
    wanted: list[bool],
) -> tuple[Tensor, ...]:
    """The operator: what is not wanted comes back empty."""
    _check_sizes(x, moments[0], weight, bias)
    if dy.shape != x.shape:
        raise InputError(f"dy must have x's shape {tuple(x.shape)}; got {tuple(dy.shape)}")
    x = native.ready(x)
    found: tuple[Tensor | None, ...]
    if _is_native(x, y):
        found = native.backward(dy, x, moments, weight, bias, y, mask, eps, activation, training, wanted=wanted)
    else:
        used = _unpacked(moments, x, mask)
        found = reference.backward(
            dy, x, used, weight, bias, eps, activation, mask=mask, y=y, batch_statistics=training
        )
        found = tuple(
            None if like is None or not want else gradient.to(like.dtype)
            for gradient, like, want in zip(found, (x, weight, bias, x), wanted, strict=True)
        )
    return tuple(x.new_empty(0) if gradient is None else gradient for gradient in found)


@torch.library.register_fake("batchnorm::forward", lib=_LIBRARY)  # type: ignore[untyped-decorator]
def _fake_forward(
    x: Tensor,
    mean: Tensor | None,
    var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mask: Tensor | None,
    eps: float,
    activation: str | None,
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(native.ready(x)), x.new_empty((2, x.shape[1]), dtype=reference.statistics_dtype(x))


@torch.library.register_fake("batchnorm::backward", lib=_LIBRARY)  # type: ignore[untyped-decorator]
def _fake_backward(
    dy: Tensor,
    x: Tensor,
    moments: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    y: Tensor | None,
    mask: Tensor | None,
    eps: float,
    activation: str | None,
    training: bool,
    wanted: list[bool],
) -> tuple[Tensor, ...]:
    x = native.ready(x)
    return tuple(
        torch.empty_like(like) if like is not None and want else x.new_empty(0)
        for like, want in zip((x, weight, bias, x), wanted, strict=True)
    )


for _name, _function in (("forward", _forward), ("backward", _backward)):
    _LIBRARY.impl(_name, _function, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]


def _transformed() -> bool:
    """Whether a transform of torch.func or forward-mode differentiation is at work."""
    return torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0


def _any_requires_grad(*tensors: Tensor | None) -> bool:
    return any(values is not None and values.requires_grad for values in tensors)


def _is_plain(x: Tensor, residual: Tensor | None) -> bool:
    """Whether the library may be called directly: nothing is watching or tracing."""
    return (
        not torch.compiler.is_compiling()
        and type(x) in (Tensor, torch.nn.Parameter)
        and torch._C._len_torch_dispatch_stack() == 0
        and _is_native(x, residual)
    )


class _Settings(NamedTuple):
    """What is no tensor to differentiate by. One object, since each argument of a Function costs its time."""

    mask: Tensor | None
    running: Running
    eps: float
    activation: str | None
    training: bool


def _needs_y(residual: Tensor | None, activation: str | None) -> bool:
    """Whether backward needs the sign of y, that of the activation's argument; without a residual x tells it."""
    return residual is not None and activation is not None


def _gradients(
    ctx: Any, dy: Tensor, moments: Tensor, mask: Tensor | None, eps: float, activation: str | None, training: bool
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of x, weight, bias and residual, the first four arguments of both Functions."""
    x, weight, bias, y, *_ = ctx.saved_tensors
    needs = ctx.needs_input_grad
    wanted = [needs[0], needs[1], needs[2], needs[3] and y is not None]
    found: Sequence[Tensor | None]
    if not torch.compiler.is_compiling() and (
        torch.is_grad_enabled()
        or _transformed()
        or torch._C._functorch.is_legacy_batchedtensor(dy)  # torch.autograd.grad(..., is_grads_batched=True)
    ):
        # A second derivative also runs through the moments, so they are taken again where it can see them.
        used = reference.moments(x, mask) if training else _unpacked(moments, x, mask)
        found = reference.backward(
            dy, x, used, weight, bias, eps, activation, mask=mask, y=y, batch_statistics=training
        )
    elif ctx.plain:
        found = native.backward(dy, x, moments, weight, bias, y, mask, eps, activation, training, wanted=wanted)
    else:
        arguments = (dy, x, moments, weight, bias, y, mask, eps, activation, training, wanted)
        found = torch.ops.batchnorm.backward(*arguments)
    dresidual = found[3] if wanted[3] else None
    if needs[3] and y is None:
        dresidual = dy if mask is None else torch.where(mask.unsqueeze(1), dy, 0.0)
    return (
        _as(found[0], x) if wanted[0] else None,
        _as(found[1], weight) if wanted[1] else None,
        _as(found[2], bias) if wanted[2] else None,
        None if dresidual is None else dresidual.to(ctx.residual_dtype),
    )


def _as(gradient: Tensor | None, like: Tensor) -> Tensor | None:
    return gradient if gradient is None or gradient.dtype == like.dtype else gradient.to(like.dtype)


class _Plain(torch.autograd.Function):
    """y = activation(weight * x_hat + bias + residual) in plain eager mode on CPU."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None, settings: _Settings
    ) -> Tensor:
        mask, running, eps, activation, training = settings
        x = native.ready(x)
        y, moments, _ = native.forward(x, weight, bias, residual, mask, running, eps, activation, training)
        ctx.save_for_backward(x, weight, bias, y if _needs_y(residual, activation) else None)
        ctx.plain, ctx.settings, ctx.moments = True, settings, moments
        ctx.residual_dtype = None if residual is None else residual.dtype
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        mask, _, eps, activation, training = ctx.settings
        return (*_gradients(ctx, dy, ctx.moments, mask, eps, activation, training), None)


class _Dispatched(torch.autograd.Function):
    """The same by the operators; the moments come back, for the running statistics to be moved outside."""

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
        eps: float,
        activation: str | None,
    ) -> tuple[Tensor, Tensor]:
        y, moments = torch.ops.batchnorm.forward(x, mean, var, weight, bias, residual, mask, eps, activation)
        ctx.save_for_backward(x, weight, bias, y if _needs_y(residual, activation) else None, mask, moments)
        ctx.plain, ctx.eps, ctx.activation, ctx.training = False, eps, activation, mean is None
        ctx.residual_dtype = None if residual is None else residual.dtype
        ctx.mark_non_differentiable(moments)
        return y, moments

    @staticmethod
    def backward(ctx: Any, dy: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
        *_, mask, moments = ctx.saved_tensors
        return (*_gradients(ctx, dy, moments, mask, ctx.eps, ctx.activation, ctx.training), *(None,) * 5)


def batch_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mask: Tensor | None,
    running: Running,
    eps: float,
    activation: str | None,
    training: bool,
) -> Tensor:
    """Normalise x (N, C, *), with the batch's statistics when training, which then move the running ones."""
    fused = activation if activation in native.FUSED else None
    if _transformed():
        used = reference.moments(x, mask) if training else _given(x, *_statistics(running))
        y = reference.forward(x, used, weight, bias, eps, fused, residual, mask)
        if training:
            _move(running, used)
    elif not (_is_plain(x, residual) and native.can_move(running)):
        given = (None, None) if training else (running.mean, running.var)
        y, moments = _Dispatched.apply(x, weight, bias, residual, mask, *given, eps, fused)  # type: ignore[no-untyped-call]
        if training:
            _move(running, _unpacked(moments, x, mask))
    elif torch.is_grad_enabled() and _any_requires_grad(x, weight, bias, residual):
        y = _Plain.apply(x, weight, bias, residual, _Settings(mask, running, eps, fused, training))  # type: ignore[no-untyped-call]
    else:
        x = native.ready(x)
        y, *_ = native.forward(x, weight, bias, residual, mask, running, eps, fused, training)
    if fused == activation:
        return y
    # Torch's own vectorised functions are faster than a fused loop over libm's scalar ones.
    assert activation is not None
    y = ACTIVATIONS[activation].function(y)
    return y if mask is None else torch.where(mask.unsqueeze(1), y, 0.0)


def _statistics(running: Running) -> tuple[Tensor, Tensor]:
    assert running.mean is not None
    assert running.var is not None
    # Copies, since a training step may come between this and the backward.
    return running.mean.clone(), running.var.clone()


@torch.no_grad()
def _move(running: Running, batch: Moments) -> None:
    """Running statistics as the native kernels move them: a batch of one value or none moves nothing."""
    if running.batches is not None:
        running.batches.add_(1)
    momentum: Tensor | float
    if running.momentum is not None:
        momentum = running.momentum
    else:
        momentum = 1.0 if running.batches is None else 1.0 / running.batches
    weight = momentum * (batch.count > 1)
    unbiased = batch.var * (batch.count / at_least_one(batch.count - 1))
    for old, new in ((running.mean, batch.mean), (running.var, unbiased)):
        if old is not None:
            old.lerp_(new.to(old.dtype), weight.to(old.dtype) if isinstance(weight, Tensor) else weight)
