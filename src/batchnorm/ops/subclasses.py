"""Subclasses of Tensor: kernels read the tensor underneath, and y gets the class that torch's batch norm would give it.

A subclass may replace any method of a tensor, and ``__torch_function__`` sees every function that is called with one.
Neither belongs in the arithmetic, so a subclass is asked once, about the whole normalization, as torch asks it about
``torch.nn.functional.batch_norm``. Subclasses with ``__torch_dispatch__`` (DTensor, fake tensors) see the operators.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from batchnorm import torch_internals
from batchnorm.kernels.native import UNWRAPPED

__all__ = ["are_overridden", "call", "without_subclass"]

T = TypeVar("T")


def are_overridden(*tensors: Any) -> bool:
    """Return whether a tensor is of a subclass that wants to see the functions which are called with it."""
    return any(type(each) not in UNWRAPPED and each is not None and has_torch_function((each,)) for each in tensors)


def call(
    function: Callable[..., Any],
    tensors: Sequence[Any],
    arguments: Sequence[Any],
    *,
    otherwise: Callable[[], Any] | None = None,
    **options: Any,
) -> Any:
    """Call a function through ``__torch_function__`` of the tensors' classes; it gets the tensors underneath.

    If the classes refuse the function, because they know a fixed list of functions, return the result of ``otherwise``.
    """
    called = False

    @functools.wraps(function)
    def seen(*arguments: Any, **options: Any) -> Any:
        nonlocal called
        called = True
        given = {name: without_subclass(value) for name, value in options.items()}
        return function(*map(without_subclass, arguments), **given)

    present = [each for each in tensors if each is not None]
    try:
        return handle_torch_function(seen, present, *arguments, **options)
    except TypeError:
        if called or otherwise is None:
            raise
        return otherwise()


def without_subclass(values: T) -> T:
    """Return the tensor underneath one of a subclass; other values, and subclasses that see operators, as they are."""
    if type(values) in UNWRAPPED or not isinstance(values, Tensor):
        return values
    if type(values).__torch_dispatch__ is not Tensor.__torch_dispatch__:
        return values
    if torch.compiler.is_compiling():
        return values.as_subclass(Tensor)  # type: ignore[return-value]
    with torch_internals.without_torch_functions():
        return Tensor.as_subclass(values, Tensor)  # type: ignore[return-value]
