"""Batch normalization as a differentiable operation on tensors.

In plain eager mode a CPU batch goes straight to the native kernels, which also move the running statistics. Under
torch.compile, export, fake tensors and dispatch modes, and on other devices, it goes through the operators
``batchnorm::forward`` and ``batchnorm::backward``, so that a compiled graph keeps each as one node, virtual batches and
all; batch renormalization also needs ``batchnorm::moments``. Transforms of torch.func, and second derivatives, take the
reference, which is made of differentiable operations.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from batchnorm.errors import InputError, warn
from batchnorm.kernels import native, reference
from batchnorm.kernels.chosen import cpu_kernel
from batchnorm.kernels.native import Limits, Rule, Running
from batchnorm.kernels.plan import Plan, Room, as_tensor, can_plan
from batchnorm.kernels.reference import ACTIVATIONS, Moments, at_least_one

__all__ = [
    "Limits",
    "Normalised",
    "Rule",
    "Running",
    "batch_norm",
    "corrected",
    "may_write",
    "moments",
    "move",
    "moved",
    "no_modes",
    "normalise",
]

_LIBRARY = torch.library.Library("batchnorm", "DEF")  # type: ignore[no-untyped-call]
for _schema in (
    "forward(Tensor x, Tensor? mean, Tensor? var, Tensor? weight, Tensor? bias, Tensor? residual, Tensor? mask, "
    "float eps, str? activation, Tensor? correction=None, SymInt chunks=1, SymInt chunk=0) -> "
    "(Tensor y, Tensor moments)",
    "backward(Tensor dy, Tensor x, Tensor moments, Tensor? weight, Tensor? bias, Tensor? y, Tensor? mask, float eps, "
    "str? activation, bool training, bool[] wanted, Tensor? correction=None, SymInt chunks=1, SymInt chunk=0) -> "
    "(Tensor dx, Tensor dweight, Tensor dbias, Tensor dresidual)",
    "moments(Tensor x, Tensor? mask, SymInt chunks=1, SymInt chunk=0) -> Tensor",
):
    _LIBRARY.define(_schema, tags=(torch.Tag.pt2_compliant_tag,))  # type: ignore[no-untyped-call]


def _is_native(x: Tensor, residual: Tensor | None) -> bool:
    return native.supports(x) and (residual is None or residual.dtype == x.dtype) and cpu_kernel() == "native"


def _packed(batches: Sequence[Moments]) -> Tensor:
    """Mean and variance as the native kernels give them: (2, C), or (2, chunks, C) of virtual batches."""
    each = batches[0] if len(batches) == 1 else reference.stacked(batches)
    return torch.stack((each.mean, each.var))


def _unpacked(moments: Tensor, x: Tensor, mask: Tensor | None, rule: Rule) -> list[Moments]:
    if rule.chunks == 1:
        return [Moments(moments[0], moments[1], reference.count_of(x, mask))]
    return [
        Moments(moments[0, i], moments[1, i], reference.count_of(_of_chunk(x, at), _mask_of_chunk(mask, at)))
        for i, at in enumerate(_chunks(x, rule))
    ]


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
    correction: Tensor | None = None,
    chunks: int = 1,
    chunk: int = 0,
) -> tuple[Tensor, Tensor]:
    """The operator: with mean and var given they are used, else the batch's own."""
    _check_sizes(x, mean, var, weight, bias)
    if (mean is None) != (var is None):
        raise InputError("mean and var must be given both or neither; got one")
    x = native.ready(x)
    rule = Rule(eps, activation, mean is None, chunks, chunk, None, correction)
    _check_chunks(x, rule)
    if _is_native(x, residual):
        y, moments, _ = native.forward(x, weight, bias, residual, mask, Running(mean, var, None, 0.0), rule)
        return y, moments
    batches = _moments_of_chunks(x, mask, rule) if mean is None or var is None else [_given(x, mean, var)]
    return _reference_forward(x, batches, weight, bias, residual, mask, rule), _packed(batches)


def _moments(x: Tensor, mask: Tensor | None, chunks: int = 1, chunk: int = 0) -> Tensor:
    """The operator: mean and biased variance (2, C), or (2, chunks, C)."""
    x, rule = native.ready(x), Rule(1.0, None, True, chunks, chunk)
    _check_chunks(x, rule)
    if not _is_native(x, None):
        return _packed(_moments_of_chunks(x, mask, rule))
    nothing = Running(None, None, None, 0.0, moving=False)
    return native.forward(x, None, None, None, mask, nothing, rule, wanted=False)[1]


def _check_sizes(x: Tensor, *per_channel: Tensor | None) -> None:
    for values in per_channel:
        if values is not None and values.shape != x.shape[1:2]:
            raise InputError(f"each channel of x, {tuple(x.shape)}, must have one number; got {tuple(values.shape)}")


def _check_chunks(x: Tensor, rule: Rule) -> None:
    if rule.chunks != 1 and not 0 < rule.chunk * (rule.chunks - 1) < x.shape[0]:
        raise InputError(
            f"chunks={rule.chunks} of chunk={rule.chunk} samples must use up those of x, the last what is left; "
            f"got {tuple(x.shape)}"
        )


def _shape_of_moments(x: Tensor, chunks: int) -> tuple[int, ...]:
    return (2, x.shape[1]) if chunks == 1 else (2, chunks, x.shape[1])


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
    correction: Tensor | None = None,
    chunks: int = 1,
    chunk: int = 0,
) -> tuple[Tensor, ...]:
    """The operator: what is not wanted comes back empty."""
    _check_sizes(x, weight, bias)
    if dy.shape != x.shape:
        raise InputError(f"dy must have x's shape {tuple(x.shape)}; got {tuple(dy.shape)}")
    x = native.ready(x)
    rule = Rule(eps, activation, training, chunks, chunk, None, correction)
    _check_chunks(x, rule)
    if moments.shape != _shape_of_moments(x, chunks):
        raise InputError(f"moments must be of shape {_shape_of_moments(x, chunks)}; got {tuple(moments.shape)}")
    found: tuple[Tensor | None, ...]
    if _is_native(x, y):
        found = native.backward(dy, x, moments, weight, bias, y, mask, rule, wanted=wanted)
    else:
        found = _reference_backward(dy, x, _unpacked(moments, x, mask, rule), weight, bias, y, mask, rule)
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
    correction: Tensor | None = None,
    chunks: int = 1,
    chunk: int = 0,
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(native.ready(x)), _fake_moments(x, mask, chunks, chunk)


@torch.library.register_fake("batchnorm::moments", lib=_LIBRARY)  # type: ignore[untyped-decorator]
def _fake_moments(x: Tensor, mask: Tensor | None, chunks: int = 1, chunk: int = 0) -> Tensor:
    return x.new_empty(_shape_of_moments(x, chunks), dtype=reference.statistics_dtype(x))


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
    correction: Tensor | None = None,
    chunks: int = 1,
    chunk: int = 0,
) -> tuple[Tensor, ...]:
    x = native.ready(x)
    return tuple(
        torch.empty_like(like) if like is not None and want else x.new_empty(0)
        for like, want in zip((x, weight, bias, x), wanted, strict=True)
    )


for _name, _function in (("forward", _forward), ("backward", _backward), ("moments", _moments)):
    _LIBRARY.impl(_name, _function, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]


def _transformed() -> bool:
    """Whether a transform of torch.func or forward-mode differentiation is at work."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def _requires_grad(x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None) -> bool:
    return (
        x.requires_grad
        or (weight is not None and weight.requires_grad)
        or (bias is not None and bias.requires_grad)
        or (residual is not None and residual.requires_grad)
    )


def no_modes() -> bool:
    """Whether neither compiler nor mode looks on, which must see operators."""
    return not torch.compiler.is_compiling() and _modes() == 0


_modes = torch._C._len_torch_dispatch_stack
_PRE_DISPATCH = torch._C.DispatchKey.PreDispatch


def _is_unwatched() -> bool:
    """The same, and no tracer that comes before autograd; a plan's own questions tell of that."""
    return no_modes() and not torch._C._dispatch_tls_is_dispatch_key_included(_PRE_DISPATCH)


def _records() -> bool:
    return torch.is_grad_enabled() and not torch.is_inference_mode_enabled()


def _needs_y(residual: Tensor | None, activation: str | None) -> bool:
    """Whether backward needs the sign of y, that of the activation's argument; without a residual x tells it."""
    return residual is not None and activation is not None


_Backward = Callable[..., Sequence[Tensor | None]]
"""Of tensors (dy, x, moments, weight, bias, y, mask), a rule, and which gradients are ``wanted``."""


def _is_differentiated(dy: Tensor) -> bool:
    """Whether the backward must be made of operations that are known to autograd, vmap and the like."""
    return not torch.compiler.is_compiling() and (
        torch.is_grad_enabled()
        or _transformed()
        or torch._C._functorch.is_legacy_batchedtensor(dy)  # torch.autograd.grad(..., is_grads_batched=True)
    )


def _gradients(
    backward: _Backward,
    dy: Tensor,
    x: Tensor,
    moments: Tensor | Room,
    weight: Tensor | None,
    bias: Tensor | None,
    y: Tensor | None,
    mask: Tensor | None,
    rule: Rule,
    needs: Sequence[bool],
) -> Sequence[Tensor | None]:
    """Gradients of x, weight, bias and residual, the first four arguments of both Functions."""
    through = y is None and needs[3]  # without an activation, whose sign y is, dy is the residual's gradient
    wanted = (*needs[:3], False) if through else needs
    found: Sequence[Tensor | None]
    if _is_differentiated(dy):
        # A second derivative also runs through the batch's moments, so they are taken again where it can see them.
        own = rule.training
        batches = _moments_of_chunks(x, mask, rule) if own else _unpacked(as_tensor(moments), x, mask, rule)
        every = _reference_backward(dy, x, batches, weight, bias, y, mask, rule)
        found = [
            _as(gradient, like) if asked else None
            for gradient, like, asked in zip(every, (x, weight, bias, x), wanted, strict=False)
        ]
    else:
        found = backward(dy, x, moments, weight, bias, y, mask, rule, wanted=wanted)
    if through:
        return (*found[:3], dy if mask is None else torch.where(mask.unsqueeze(1), dy, 0.0))
    return found


def _directly(
    dy: Tensor,
    x: Tensor,
    moments: Tensor | Room,
    weight: Tensor | None,
    bias: Tensor | None,
    y: Tensor | None,
    mask: Tensor | None,
    rule: Rule,
    *,
    wanted: Sequence[bool],
) -> Sequence[Tensor | None]:
    """By the native kernels, unless dy, or what hooks made of the others, is not for them."""
    if not (_is_unwatched() and native.are_plain(dy, x, weight, bias, y) and _is_native(x, y)):
        return _by_operator(dy, x, moments, weight, bias, y, mask, rule, wanted=wanted)
    return native.backward(dy, native.ready(x), as_tensor(moments), weight, bias, y, mask, rule, wanted=wanted)


def _by_operator(
    dy: Tensor,
    x: Tensor,
    moments: Tensor | Room,
    weight: Tensor | None,
    bias: Tensor | None,
    y: Tensor | None,
    mask: Tensor | None,
    rule: Rule,
    *,
    wanted: Sequence[bool],
) -> Sequence[Tensor | None]:
    asked = list(wanted[:4])
    how = (rule.eps, rule.activation, rule.training, asked, rule.correction, rule.chunks, rule.chunk)
    found = torch.ops.batchnorm.backward(dy, x, as_tensor(moments), weight, bias, y, mask, *how)
    return [gradient if wants else None for gradient, wants in zip(found, asked, strict=True)]


def _as(gradient: Tensor, like: Tensor | None) -> Tensor:
    return gradient if like is None or gradient.dtype == like.dtype else gradient.to(like.dtype)


def _moments_of_chunks(x: Tensor, mask: Tensor | None, rule: Rule) -> list[Moments]:
    return [reference.moments(_of_chunk(x, at), _mask_of_chunk(mask, at)) for at in _chunks(x, rule)]


def _reference_forward(
    x: Tensor,
    batches: Sequence[Moments],
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mask: Tensor | None,
    rule: Rule,
) -> Tensor:
    """The output made of differentiable operations, chunk by chunk, with the moments of each."""
    outputs = []
    for i, at in enumerate(_chunks(x, rule)):
        scale, shift = corrected(weight, bias, *_correction_of(rule, i))
        part_residual = None if residual is None else _of_chunk(residual, at)
        how = (rule.eps, rule.activation, part_residual, _mask_of_chunk(mask, at))
        outputs.append(reference.forward(_of_chunk(x, at), batches[i], scale, shift, *how))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def _reference_backward(
    dy: Tensor,
    x: Tensor,
    batches: Sequence[Moments],
    weight: Tensor | None,
    bias: Tensor | None,
    y: Tensor | None,
    mask: Tensor | None,
    rule: Rule,
) -> tuple[Tensor, ...]:
    """The gradients made of differentiable operations, chunk by chunk, with the moments of each."""
    parts = []
    for i, at in enumerate(_chunks(x, rule)):
        r, d = _correction_of(rule, i)
        scale, shift = corrected(weight, bias, r, d)
        dx, dscale, dshift, dresidual = reference.backward(
            _of_chunk(dy, at),
            _of_chunk(x, at),
            batches[i],
            scale,
            shift,
            rule.eps,
            rule.activation,
            mask=_mask_of_chunk(mask, at),
            y=None if y is None else _of_chunk(y, at),
            batch_statistics=rule.training,
        )
        parts.append((dx, dscale if r is None or d is None else r * dscale + d * dshift, dshift, dresidual))
    if len(parts) == 1:
        return parts[0]
    of_x, of_weight, of_bias, of_residual = zip(*parts, strict=True)
    return torch.cat(of_x), torch.stack(of_weight).sum(0), torch.stack(of_bias).sum(0), torch.cat(of_residual)


class _Plain(torch.autograd.Function):
    """y as the native kernels have made it, with its gradients: in plain eager mode on CPU."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None, made: tuple[Any, ...]
    ) -> Tensor:
        y: Tensor
        y, ctx.kept = made  # one object, since each argument of a Function costs its time
        ctx.save_for_backward(x, weight, bias, y if _needs_y(residual, ctx.kept[3].activation) else None)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, y = ctx.saved_tensors
        backward, moments, mask, rule = ctx.kept
        if _modes() != 0:
            backward = _by_operator
        return (*_gradients(backward, dy, x, moments, weight, bias, y, mask, rule, ctx.needs_input_grad), None)


# Function.apply without its search for functorch's wrappers, a tenth of a small batch's time; here there are none.
_apply_plain = super(torch.autograd.function._SingleLevelFunction, _Plain).apply
# And the engine's call of backward without a search for other forms that it might have.
_Plain._backward_cls.apply = _Plain.backward  # type: ignore[attr-defined]


class _Dispatched(torch.autograd.Function):
    """The same by the operators; the moments come back, to move the running statistics by."""

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
        eps: float,
        activation: str | None,
        chunks: int,
        chunk: int,
    ) -> tuple[Tensor, Tensor]:
        how = (eps, activation, correction, chunks, chunk)
        y, moments = torch.ops.batchnorm.forward(x, mean, var, weight, bias, residual, mask, *how)
        sign = y if _needs_y(residual, activation) else None
        ctx.save_for_backward(x, weight, bias, sign, mask, moments, correction)
        ctx.eps, ctx.activation, ctx.training, ctx.chunks, ctx.chunk = eps, activation, mean is None, chunks, chunk
        ctx.residual_dtype = None if residual is None else residual.dtype
        ctx.mark_non_differentiable(moments)
        return y, moments

    @staticmethod
    def backward(ctx: Any, dy: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
        # Once: a checkpoint lets them be unpacked no more often.
        x, weight, bias, y, mask, moments, correction = ctx.saved_tensors
        rule = Rule(ctx.eps, ctx.activation, ctx.training, ctx.chunks, ctx.chunk, None, correction)
        needs = ctx.needs_input_grad
        *others, dresidual = _gradients(_by_operator, dy, x, moments, weight, bias, y, mask, rule, needs)
        dresidual = None if dresidual is None else dresidual.to(ctx.residual_dtype)
        return (*others, dresidual, *(None,) * 8)


class Normalised(NamedTuple):
    """What became of a batch: y, the moments of all of it, the r and d of its batch renormalization (2, *, C)."""

    y: Tensor
    moments: Moments | None
    correction: Tensor | None


def batch_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mask: Tensor | None,
    running: Running,
    rule: Rule,
) -> Tensor:
    """Normalise x (N, C, *), with the batch's statistics when training, which then move the running ones."""
    return normalise(x, weight, bias, residual, mask, running, rule, moments=False).y


def normalise(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mask: Tensor | None,
    running: Running,
    rule: Rule,
    *,
    moments: bool = True,
) -> Normalised:
    """The same, and what came of it; without ``moments`` these may be missing, which spares pooling them."""
    activation = rule.activation
    if activation not in native.FUSED:
        rule = rule._replace(activation=None)
    if not _is_direct(x, weight, bias, residual, mask, running, rule):
        y, batch, correction = _composed(x, weight, bias, residual, mask, running, rule)
    else:
        x = native.ready(x)
        y, packed, correction = native.forward(x, weight, bias, residual, mask, running, rule)
        if _records() and _requires_grad(x, weight, bias, residual):
            used = rule if correction is rule.correction else rule._replace(correction=correction)
            y = _apply_plain(x, weight, bias, residual, (y, (_directly, packed, mask, used)))  # type: ignore[no-untyped-call]
        batch = _pooled(packed, x, mask, rule) if moments else None
    if rule.activation != activation:
        # Torch's own vectorised functions are faster than a fused loop over libm's scalar ones.
        assert activation is not None
        y = ACTIVATIONS[activation].function(y)
        y = y if mask is None else torch.where(mask.unsqueeze(1), y, 0.0)
    return Normalised(y, batch, correction)


def _is_direct(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mask: Tensor | None,
    running: Running,
    rule: Rule,
) -> bool:
    """Whether a batch goes straight to the native kernels."""
    mean, var, batches, _, skipped, *_ = running
    return (
        _is_unwatched()
        and not _transformed()
        and native.are_plain(x, weight, bias, residual, mask, mean, var, batches, skipped, rule.correction)
        and _is_native(x, residual)
        and native.can_move(running)
    )


def planned(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None, running: Running, rule: Rule
) -> Plan | None:
    """A plan for calls of `batch_norm` like this one, if it goes straight to the native kernels."""
    fits = (
        can_plan()
        and rule.activation in native.FUSED
        and _is_direct(x, weight, bias, residual, None, running, rule)
        and native.is_ready(x)
        and x.numel() > 0
        and native.reads(x, (residual,), (weight, bias, running.mean, running.var))
    )
    if not fits:
        return None
    native.check_counts(running)
    return Plan(x, weight, bias, residual, running, rule, _directly)


def again(
    plan: Plan,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    *statistics: Tensor | None,
) -> Tensor | None:
    """As `batch_norm` where there are `no_modes`, of tensors like those of the plan; None where they are not."""
    made = None if forward_ad._current_level >= 0 else plan.forward(x, weight, bias, residual, *statistics)
    if made is None:
        return None
    y, room = made
    if plan.differentiable and _records():
        kept = plan.backward, room, None, plan.rule
        y = _apply_plain(x, weight, bias, residual, (y, kept))  # type: ignore[no-untyped-call]
    return y


@torch.no_grad()
def moments(x: Tensor, mask: Tensor | None = None) -> Moments:
    """Mean and biased variance (C,) of x (N, C, *), and the count, without a gradient."""
    if _transformed():
        return reference.moments(x, mask)
    direct = _is_unwatched() and native.are_plain(x, mask) and _is_native(x, None)
    found = (_moments if direct else torch.ops.batchnorm.moments)(x, mask)
    return Moments(found[0], found[1], reference.count_of(x, mask))


def _composed(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mask: Tensor | None,
    running: Running,
    rule: Rule,
) -> Normalised:
    """By the operators, or under a transform by the reference; renormalization's r and d outside of both."""
    transformed = _transformed()
    batches: list[Moments] = []
    if transformed:
        training = rule.training
        batches = _moments_of_chunks(x, mask, rule) if training else [_given(x, *_statistics(running))]
    if rule.limits is not None and rule.correction is None:
        found = _packed(batches) if transformed else torch.ops.batchnorm.moments(x.detach(), mask, *rule[3:5])
        each = Moments(found[0], found[1], 0)
        r_and_d = reference.renormalised(each, *_statistics(running), rule.eps, *rule.limits)
        rule = rule._replace(correction=torch.stack(r_and_d))
    if transformed:
        y = _reference_forward(x, batches, weight, bias, residual, mask, rule)
        whole = batches[0] if len(batches) == 1 else reference.pooled(reference.stacked(batches))
    else:
        given = (None, None) if rule.training else (running.mean, running.var)
        how = (rule.correction, rule.eps, rule.activation, rule.chunks, rule.chunk)
        y, packed = _Dispatched.apply(x, weight, bias, residual, mask, *given, *how)  # type: ignore[no-untyped-call]
        whole = _pooled(packed, x, mask, rule)
    if rule.training:
        move(running, whole)
    return Normalised(y, whole, rule.correction)


def _chunks(x: Tensor, rule: Rule) -> Sequence[slice | None]:
    """The slices of x that have statistics of their own; None stands for all of it."""
    if rule.chunks == 1:
        return [None]
    ends = [rule.chunk * (i + 1) for i in range(rule.chunks - 1)] + [x.shape[0]]
    return [slice(rule.chunk * i, end) for i, end in enumerate(ends)]


def _of_chunk(values: Tensor, at: slice | None) -> Tensor:
    return values if at is None else values[at]


def _mask_of_chunk(mask: Tensor | None, at: slice | None) -> Tensor | None:
    return mask if mask is None or mask.shape[0] == 1 else _of_chunk(mask, at)


def _correction_of(rule: Rule, chunk: int) -> tuple[Tensor, Tensor] | tuple[None, None]:
    if rule.correction is None:
        return None, None
    of_all = rule.correction.view(2, rule.chunks, -1)
    return of_all[0, chunk], of_all[1, chunk]


def corrected(
    weight: Tensor | None, bias: Tensor | None, r: Tensor | None, d: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """``weight * (r * x_hat + d) + bias`` as a scale and a shift of x_hat."""
    if r is None or d is None:
        return weight, bias
    scale, shift = (r, d) if weight is None else (weight.to(r.dtype) * r, weight.to(d.dtype) * d)
    return scale, shift if bias is None else shift + bias.to(shift.dtype)


def _pooled(moments: Tensor, x: Tensor, mask: Tensor | None, rule: Rule) -> Moments:
    """The moments of all of x, from those of its chunks; in a compiled graph their number stays open."""
    if rule.chunks == 1:
        return Moments(moments[0], moments[1], reference.count_of(x, mask))
    samples = x.shape[0]
    counted = torch.ones_like(x[:, 0], dtype=torch.bool) if mask is None else mask.expand(samples, *x.shape[2:])
    of_samples = counted.reshape(samples, -1).sum(1).to(moments.dtype)
    chunk_of = (torch.arange(samples, device=x.device) // rule.chunk).clamp(max=rule.chunks - 1)
    counts = moments.new_zeros(rule.chunks).index_add_(0, chunk_of, of_samples)
    return reference.pooled(Moments(moments[0], moments[1], counts))


def _statistics(running: Running) -> tuple[Tensor, Tensor]:
    assert running.mean is not None
    assert running.var is not None
    # Copies, since a training step may come between this and the backward.
    return running.mean.clone(), running.var.clone()


@torch.no_grad()
def move(running: Running, batch: Moments) -> None:
    """Move running statistics by a batch's moments (C,), as the native kernels do.

    A batch of one value or none moves nothing but the count of batches. Where ``running.skipped`` is given, a batch
    with a channel whose mean or variance is not finite moves nothing but that.
    """
    mean, var, batches, momentum, skipped, biased, moving = running
    held = [(old, new) for old, new in ((mean, batch.mean), (var, _kept(batch, biased))) if old is not None]
    if not moving or not (held or batches is not None) or not may_write(batches if mean is None else mean):
        return
    finite: Tensor | None = None
    if skipped is not None and held:
        finite = torch.stack([new.to(old.dtype).isfinite().all() for old, new in held]).all()
        skipped.add_(~finite)
    if batches is not None:
        batches.add_(1 if finite is None else finite)
    share = _share(momentum, batches)
    moves = _moves(batch) if finite is None else finite & _moves(batch)
    for old, new in held:
        old.copy_(torch.where(moves, _between(old, new, share), old))


def moved(running: Running, batch: Moments) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, variance and count of batches as `move` would leave them, without a gradient."""
    mean, var, batches, momentum, _, biased, _ = running
    assert mean is not None
    assert var is not None
    assert batches is not None
    batches = batches + 1
    share, moves = _share(momentum, batches), _moves(batch)
    old_and_new = ((mean.detach(), batch.mean.detach()), (var.detach(), _kept(batch, biased).detach()))
    new_mean, new_var = (torch.where(moves, _between(old, new, share), old) for old, new in old_and_new)
    return new_mean, new_var, batches


def _moves(batch: Moments) -> Tensor:
    """Whether a batch has enough values, two a channel, to move running statistics."""
    count = batch.count
    return (count if isinstance(count, Tensor) else torch.full((), count, device=batch.mean.device)) > 1


def _share(momentum: float | None, batches: Tensor | None) -> Tensor | float:
    """The weight of the batch in the running statistics; batches has counted it."""
    if momentum is not None:
        return momentum
    # In float64, since a quotient of whole numbers is a float32.
    return 1.0 if batches is None else 1.0 / batches.to(reference.statistics_dtype(batches))


def _between(old: Tensor, new: Tensor, share: Tensor | float) -> Tensor:
    """As torch weighs them; lerp makes NaN of an infinite value where the share is 0.5 or more."""
    share = share.to(old.dtype) if isinstance(share, Tensor) else share
    return share * new.to(old.dtype) + (1 - share) * old


def _kept(batch: Moments, biased: bool) -> Tensor:
    """The variance that running statistics keep."""
    count = batch.count.to(batch.var.dtype) if isinstance(batch.count, Tensor) else batch.count
    return batch.var if biased else batch.var * (count / at_least_one(count - 1))


def may_write(values: Tensor | None) -> bool:
    """Whether what is kept of a batch may be written to the values: under a transform those that it has been given.

    Raises
    ------
    InputError
        Under vmap the others: each of its samples would move them.
    """
    if torch.compiler.is_compiling() or not _transformed():
        return True
    if values is not None and torch._C._functorch.is_functorch_wrapped_tensor(values):
        return True
    levels = torch._C._functorch.get_interpreter_stack() or []
    if any(level.key() == torch._C._functorch.TransformType.Vmap for level in levels):
        raise InputError(
            "under vmap a training batch can't move running statistics that are not mapped over too; pass them in "
            "with torch.func.functional_call, or use batchnorm.normalize, which returns them"
        )
    _warn_of_captured()
    return False


@functools.cache
def _warn_of_captured() -> None:
    warn(
        "under torch.func.grad or jvp running statistics that are no argument of the transformed function are left as "
        "they are; batchnorm.normalize returns them moved"
    )
