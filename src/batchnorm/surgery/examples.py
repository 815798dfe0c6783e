"""Runs of a model on an example, which leave the model as it was, and the difference between two of them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx.node import map_aggregate

from batchnorm.errors import InputError, InputTypeError, UnsupportedError
from batchnorm.nn.buffers import Buffers, context_of
from batchnorm.nn.contexts import PLAIN
from batchnorm.statistics.changes import layer_name
from batchnorm.surgery.attributes import Attributes
from batchnorm.surgery.opening import deep_copy, is_lazy

__all__ = ["Example", "arguments_of", "check_example", "check_kept", "copied_tensors", "eval_outputs"]
__all__ += ["largest_difference", "run_example", "trial_copy", "untouched"]

Example = Tensor | tuple[Any, ...] | Mapping[str, Any]
"""A tensor, a tuple of positional arguments, or a mapping of keyword arguments."""

BEYOND_ROUNDING = {torch.float64: 1e-6, torch.float32: 0.01, torch.bfloat16: 0.5, torch.float16: 0.3}
"""Differences above this part of the largest output are no rounding, however deep the model is."""


def check_example(model: nn.Module, example: Example) -> None:
    """Raise an error unless a model can be run on an example: for the kind of the example, and for a lazy model.

    Raises
    ------
    InputTypeError
        The example is neither a tensor, nor a tuple, nor a mapping.
    InputError
        A layer of the model has seen no batch yet.
    """
    if not isinstance(example, Tensor | tuple | Mapping):
        raise InputTypeError(
            "example must be a tensor, a tuple of positional arguments, or a mapping of keyword arguments; got "
            f"{type(example).__name__}"
        )
    for path, module in model.named_modules():
        if is_lazy(module):
            raise InputError(
                f"the model must be initialized before it runs on an example; got a lazy {type(module).__name__} at "
                f"{layer_name(path)}. Run the model on a batch first"
            )


@torch.no_grad()
def run_example(model: nn.Module, example: Example) -> list[Tensor]:
    """Return all floating-point tensors among the outputs of a model for an example, in its present mode.

    The buffers, attributes and random state are afterwards as before.

    Raises
    ------
    InputTypeError, InputError
        As `check_example`; or the forward fails.
    """
    check_example(model, example)
    arguments, keywords = arguments_of(example)
    with untouched(model):
        try:
            outputs = model(*copied_tensors(arguments), **copied_tensors(keywords))
        except Exception as error:
            raise InputError(
                f"example must be an input that the model takes; got {_described(example)}, for which "
                f"{type(model).__name__} raised {type(error).__name__}: {' '.join(str(error).split())}"
            ) from error
        return [values.clone() for values in _tensors(outputs)]


def eval_outputs(model: nn.Module, example: Example) -> list[Tensor]:
    """Do as `run_example` in eval mode; the modes are afterwards as before."""
    check_example(model, example)
    with untouched(model):
        model.eval()
        return run_example(model, example)


def largest_difference(before: Sequence[Tensor], after: Sequence[Tensor]) -> float:
    """Return the largest absolute difference between outputs; infinity if there are others or of other shapes.

    NaN equals NaN, and an infinity itself.
    """
    if [values.shape for values in before] != [values.shape for values in after]:
        return math.inf
    return max(map(_difference, before, after), default=0.0)


def check_kept(function: str, before: Sequence[Tensor], after: Sequence[Tensor]) -> float:
    """Return the largest difference between the outputs of a model and of the one that surgery made.

    Raises
    ------
    UnsupportedError
        It is more than rounding explains: the forward depends on something that reading it did not show.
    """
    difference = largest_difference(before, after)
    for values, made in zip(before, after, strict=False):
        largest = float(values[values.isfinite()].abs().max()) if values.isfinite().any() else 0.0
        if values.shape != made.shape or _difference(values, made) > BEYOND_ROUNDING[values.dtype] * largest:
            raise UnsupportedError(
                f"{function} must keep the outputs of the model; on the example they differ by {difference:.2g}, where "
                f"the largest is {largest:.2g}. The forward depends on something that reading it did not show; nothing "
                "was changed"
            )
    return difference


def trial_copy(model: nn.Module, function: str) -> nn.Module | None:
    """Return a copy on which an operation is tried before it changes the model itself.

    It is None where a context, as `use_domain`, is open for layers, which the copy does not have.

    Raises
    ------
    UnsupportedError
        The model cannot be copied.
    """
    if any(isinstance(module, Buffers) and context_of(module) != PLAIN for module in model.modules()):
        return None
    try:
        return deep_copy(model)
    except Exception as error:  # whatever a module's own __deepcopy__ or __reduce__ raises
        raise UnsupportedError(
            f"{function} with an example is tried on a copy of the model first, which cannot be made: "
            f"{type(error).__name__}: {error}. Leave the example out"
        ) from error


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Restore the modes, buffers and attributes of the modules, and the random state of torch, at the end."""
    attributes = Attributes(model)
    buffers = [(values, values.detach().clone()) for values in model.buffers() if not values.is_meta]
    cuda = sorted({values.device.index for values in (*model.parameters(), *model.buffers()) if values.is_cuda})
    with torch.random.fork_rng(cuda):
        try:
            yield
        finally:
            attributes.restore()
            with torch.no_grad():
                for values, content in buffers:
                    if not torch.equal(values, content):
                        values.copy_(content)


def arguments_of(example: Example) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the positional and the keyword arguments of the call that an example stands for."""
    if isinstance(example, Mapping):
        return (), dict(example)
    return (example if isinstance(example, tuple) else (example,)), {}


def copied_tensors(values: Any) -> Any:
    """Return nested arguments with copies of their tensors, which a forward may write over."""
    return map_aggregate(values, lambda value: value.detach().clone() if isinstance(value, Tensor) else value)


def _tensors(outputs: object) -> Iterator[Tensor]:
    """Iterate over the floating-point tensors in nested containers, in their order."""
    if isinstance(outputs, Tensor):
        if outputs.is_floating_point():
            yield outputs
    elif isinstance(outputs, Mapping):
        for value in outputs.values():
            yield from _tensors(value)
    elif isinstance(outputs, Sequence | Set) and not isinstance(outputs, str | bytes):
        for value in outputs:
            yield from _tensors(value)
    elif dataclasses.is_dataclass(outputs) and not isinstance(outputs, type):
        for field in dataclasses.fields(outputs):
            yield from _tensors(getattr(outputs, field.name))


def _difference(before: Tensor, after: Tensor) -> float:
    a, b = before.detach().double(), after.detach().double()
    same = (a == b) | (a.isnan() & b.isnan())
    differences = torch.where(same, 0.0, (a - b).abs())
    return math.inf if differences.isnan().any() else float(differences.max()) if differences.numel() else 0.0


def _described(example: object) -> str:
    """Return the shapes of an example."""
    if isinstance(example, Tensor):
        return f"shape {tuple(example.shape)} of {example.dtype}"
    if isinstance(example, tuple):
        return f"({', '.join(map(_described, example))})"
    if isinstance(example, Mapping):
        return ", ".join(f"{name}={_described(value)}" for name, value in example.items())
    return repr(example) if isinstance(example, int | float | str | bool | None) else type(example).__name__
