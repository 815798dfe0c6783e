"""The operators ``torch.ops.batchnorm``: the only place where records become flat lists of arguments and back."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from batchnorm.errors import InputError
from batchnorm.kernels import native
from batchnorm.kernels.records import BatchMoments, Gradients, Operands, Rule, Running
from batchnorm.kernels.reference import statistics_dtype
from batchnorm.ops import chunks
from batchnorm.ops.dispatch import is_native, is_sharded
from batchnorm.ops.subclasses import without_subclass

__all__ = [
    "BACKWARD",
    "FORWARD",
    "MOMENTS",
    "NAMES",
    "Operator",
    "backward",
    "forward",
    "moments",
    "moments_rule",
    "take",
]

Record = TypeVar("Record", Operands, Rule)
Implementation = TypeVar("Implementation", bound=Callable[..., Any])

NAMES: dict[str, tuple[list[str], list[str]]] = {}
"""The names of the arguments and of the results of each operator."""

_LIBRARY = torch.library.Library("batchnorm", "DEF")  # type: ignore[no-untyped-call]


class Operator:
    """An operator, whose schema names its flat arguments as the fields of records are named.

    A call flattens records into the schema's arguments; an implementation receives them by name.
    """

    def __init__(self, name: str, arguments: str, results: str) -> None:
        self._name = name
        declared = [argument.split()[1].split("=") for argument in arguments.split(", ")]
        self._names = [name for name, *_ in declared]
        self._defaults = {name: None if value == "None" else int(value) for name, *rest in declared for value in rest}
        NAMES[name] = self._names, re.findall(r"Tensor (\w+)", results) or [name]
        schema = f"{name}({arguments}) -> {results}"
        _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))  # type: ignore[no-untyped-call]

    def __call__(self, *records: Any, **others: Any) -> Any:
        """Call the operator with the fields of the records, and others, that its schema names."""
        values = dict(others)
        for record in records:
            values.update(zip(record._fields, record, strict=True))
        return getattr(torch.ops.batchnorm, self._name)(*[values[name] for name in self._names])

    def _by_name(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def flat(*arguments: Any, **given: Any) -> Any:
            named = self._defaults | dict(zip(self._names, arguments, strict=False)) | given
            return function({name: without_subclass(value) for name, value in named.items()})

        return flat

    def implementation(self, function: Implementation) -> Implementation:
        """Register the function, of a dictionary of arguments, for every device."""
        _LIBRARY.impl(self._name, self._by_name(function), "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
        return function

    def fake(self, function: Implementation) -> Implementation:
        """Register the function, of a dictionary of arguments, for fake tensors."""
        torch.library.register_fake(f"batchnorm::{self._name}", self._by_name(function), lib=_LIBRARY)
        return function

    def gradients(
        self, backward: Callable[..., dict[str, Tensor | None]], save: Callable[..., None], *, once: bool = False
    ) -> None:
        """Register the formula of the gradients, which every recorder of the operator gets.

        Parameters
        ----------
        backward : callable
            Takes the context, a dictionary of the arguments that need gradients, and the gradients of the results.
            Returns the gradients by the names of the arguments.
        save : callable
            Takes the context, a dictionary of the arguments, and the results.
        once : bool
            The gradients cannot be differentiated; torch raises an error where they would be.
        """

        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            save(ctx, dict(zip(self._names, inputs, strict=True)), output)

        def flat(ctx: Any, *gradients: Any) -> tuple[Tensor | None, ...]:
            names = self._names[: len(ctx.needs_input_grad)]  # torch drops last arguments that are the defaults
            needs = dict(zip(names, ctx.needs_input_grad, strict=True))
            found = backward(ctx, needs, *gradients)
            return tuple(found.get(name) for name in names)

        formula = once_differentiable(flat) if once else flat
        torch.library.register_autograd(f"batchnorm::{self._name}", formula, setup_context=setup_context, lib=_LIBRARY)


def take(record: type[Record], given: dict[str, Any], **otherwise: Any) -> Record:
    """Make a record of the arguments that are named like its fields; ``otherwise`` has those that the schema lacks."""
    values = otherwise | given
    return record(**{name: values[name] for name in record._fields if name in values})


FORWARD = Operator(
    "forward",
    "Tensor x, Tensor? mean, Tensor? var, Tensor? weight, Tensor? bias, Tensor? residual, Tensor? mask, float eps, "
    "str? activation, Tensor? correction=None, SymInt chunks=1, SymInt chunk=0",
    "(Tensor y, Tensor moments)",
)
BACKWARD = Operator(
    "backward",
    "Tensor dy, Tensor x, Tensor moments, Tensor? weight, Tensor? bias, Tensor? y, Tensor? mask, float eps, "
    "str? activation, bool training, bool[] wanted, Tensor? correction=None, SymInt chunks=1, SymInt chunk=0",
    "(Tensor dx, Tensor dweight, Tensor dbias, Tensor dresidual)",
)
MOMENTS = Operator("moments", "Tensor x, Tensor? mask, SymInt chunks=1, SymInt chunk=0", "Tensor")


def forward(operands: Operands, running: Running, rule: Rule) -> tuple[Tensor, Tensor]:
    """Call ``batchnorm::forward``, which uses the mean and var of ``running``, or in training the batch's.

    Returns y and the packed moments, which have no gradient.
    """
    statistics = Running() if rule.training else running
    return FORWARD(operands, statistics, rule)  # type: ignore[no-any-return]


def backward(
    dy: Tensor, operands: Operands, moments: Tensor, rule: Rule, *, y: Tensor | None = None, wanted: Sequence[bool]
) -> Gradients:
    """Call ``batchnorm::backward`` for the gradients that are ``wanted``."""
    # torch keeps what it has found for DTensors without regard to `wanted`.
    asked = [True] * 4 if is_sharded(dy, operands.x) else list(wanted[:4])
    found = BACKWARD(operands, rule, dy=dy, moments=moments, y=y, wanted=asked)
    return Gradients(*[gradient if wants else None for gradient, wants in zip(found, wanted, strict=False)])


def moments(x: Tensor, mask: Tensor | None, rule: Rule) -> Tensor:
    """Call ``batchnorm::moments``, which returns packed mean and biased variance."""
    return MOMENTS(rule, x=x, mask=mask)  # type: ignore[no-any-return]


@FORWARD.implementation
def _forward(given: dict[str, Any]) -> tuple[Tensor, Tensor]:
    operands, mean, var = take(Operands, given), given["mean"], given["var"]
    _check_sizes(operands.x, mean, var, operands.weight, operands.bias)
    if (mean is None) != (var is None):
        raise InputError("mean and var must be given both or neither; got one")
    operands = operands._replace(x=native.ready(operands.x))
    rule = take(Rule, given, training=mean is None)
    chunks.check_chunks(operands.x, rule)
    if is_native(operands.x, operands.residual):
        y, packed, _ = native.forward(operands, Running(mean, var), rule)
        return y, packed
    if rule.training:
        batches = chunks.moments_of_chunks(operands.x, operands.mask, rule)
    else:
        dtype = statistics_dtype(operands.x)
        batches = [BatchMoments(mean.to(dtype), var.to(dtype), 0)]
    return _laid_out_like(operands.x, chunks.forward(operands, batches, rule)), chunks.pack(batches)


@MOMENTS.implementation
def _moments(given: dict[str, Any]) -> Tensor:
    return moments_without_dispatch(given["x"], given["mask"], moments_rule(given))


def moments_without_dispatch(x: Tensor, mask: Tensor | None, rule: Rule) -> Tensor:
    """Return packed mean and biased variance, (2, C) or (2, chunks, C), without a call through torch's dispatcher."""
    x = native.ready(x)
    chunks.check_chunks(x, rule)
    if is_native(x):
        return native.moments(x, mask, rule)
    return chunks.pack(chunks.moments_of_chunks(x, mask, rule))


def moments_rule(given: dict[str, Any]) -> Rule:
    """Return the rule of a call of ``batchnorm::moments``."""
    return take(Rule, given, eps=1.0, activation=None, training=True)


@BACKWARD.implementation
def _backward(given: dict[str, Any]) -> tuple[Tensor, ...]:
    dy, packed, wanted = given["dy"], given["moments"], given["wanted"]
    operands, y, rule = take(Operands, given), given["y"], take(Rule, given)
    _check_sizes(operands.x, operands.weight, operands.bias)
    if dy.shape != operands.x.shape:
        raise InputError(f"dy must have x's shape {tuple(operands.x.shape)}; got {tuple(dy.shape)}")
    operands = operands._replace(x=native.ready(operands.x))
    chunks.check_chunks(operands.x, rule)
    shape = chunks.moments_shape(operands.x, rule)
    if packed.shape != shape:
        raise InputError(f"moments must be of shape {shape}; got {tuple(packed.shape)}")
    found: Sequence[Tensor | None]
    if is_native(operands.x, y):
        found = native.backward(dy, operands, packed, rule, y=y, wanted=wanted)
    else:
        batches = chunks.unpack(packed, operands.x, operands.mask, rule)
        found = [
            None if like is None or not wants else _laid_out_like(like, gradient.to(like.dtype))
            for gradient, like, wants in zip(
                chunks.backward(dy, operands, batches, rule, y=y), _like_gradients(operands), wanted, strict=True
            )
        ]
    return tuple(operands.x.new_empty(0) if gradient is None else gradient for gradient in found)


@FORWARD.fake
def _fake_forward(given: dict[str, Any]) -> tuple[Tensor, Tensor]:
    return torch.empty_like(native.ready(given["x"])), _fake_moments(given)


@MOMENTS.fake
def _fake_moments(given: dict[str, Any]) -> Tensor:
    x: Tensor = given["x"]
    return x.new_empty(chunks.moments_shape(x, moments_rule(given)), dtype=statistics_dtype(x))


@BACKWARD.fake
def _fake_backward(given: dict[str, Any]) -> tuple[Tensor, ...]:
    operands = take(Operands, given | {"x": native.ready(given["x"])})
    return tuple(
        torch.empty_like(like) if like is not None and wants else operands.x.new_empty(0)
        for like, wants in zip(_like_gradients(operands), given["wanted"], strict=True)
    )


def _like_gradients(operands: Operands) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor]:
    """Return the tensors whose shapes and dtypes the four gradients have; the residual's are those of x."""
    return operands.x, operands.weight, operands.bias, operands.x


def _laid_out_like(like: Tensor, values: Tensor) -> Tensor:
    """Return the values in the layout that the fakes promise, and the native kernels give."""
    return values if values.stride() == like.stride() else torch.empty_like(like).copy_(values)


def _check_sizes(x: Tensor, *per_channel: Tensor | None) -> None:
    for values in per_channel:
        if values is not None and values.shape != x.shape[1:2]:
            raise InputError(
                f"weight, bias, mean and var must have one number for each channel of x, {tuple(x.shape)}; "
                f"got shape {tuple(values.shape)}"
            )
