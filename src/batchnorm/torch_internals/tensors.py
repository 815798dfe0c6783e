"""Properties of tensors that decide whether the kernels can read them, and the class that compares tensors."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from batchnorm.torch_internals.lookup import accessor
from batchnorm.torch_internals.transforms import inside_vmap

__all__ = ["has_storage", "is_functional", "is_zero_tensor", "tensor_guards", "without_torch_functions"]


@accessor(
    "torch._C._has_storage",
    probe=lambda has: has(torch.zeros(1)) is True and inside_vmap(has) is False,
)
def has_storage(values: Tensor) -> bool:
    """Return whether the tensor holds its values itself; False where torch does not tell."""
    return False


def _tells_functional(is_functional: Callable[[Tensor], bool]) -> bool:
    told = []

    def function(x: Tensor) -> Tensor:
        told.append(is_functional(x))
        return x.clone()

    torch.func.functionalize(function)(torch.zeros(1))
    return told == [True] and is_functional(torch.zeros(1)) is False


@accessor("torch._is_functional_tensor", probe=_tells_functional)
def is_functional(values: Tensor) -> bool:
    """Return whether the tensor belongs to a functionalized graph; True where torch does not tell."""
    return True


@accessor("torch.Tensor._is_zerotensor", probe=lambda is_zero: is_zero(torch.ones(1)) is False)
def is_zero_tensor(values: Tensor) -> bool:
    """Return whether the tensor stands for zeros that are nowhere in memory; True where torch does not tell."""
    return True


def _compares(guards: Any) -> bool:
    one, other = torch.empty(1, dtype=torch.float32), torch.empty(2, dtype=torch.float32)
    like = guards(one, dynamic_dims_sizes=[[1]], dynamic_dims_strides=[[1]]).check
    return like(one) is True and like(other) is False and like(one.double()) is False


@accessor(
    "torch._C._dynamo.guards.TensorGuards", make=lambda guards: lambda: guards, probe=lambda get: _compares(get())
)
def tensor_guards() -> Any:
    """Return torch.compile's class that compares tensors with earlier ones in all but their values, or None."""
    return None


def _hides_subclasses(without: Callable[[], Any]) -> bool:
    class Subclass(Tensor):
        pass

    x = torch.zeros(1).as_subclass(Subclass)
    with without():
        inside = type(x + 1)
    return inside is Tensor and type(x + 1) is Subclass


@accessor("torch._C.DisableTorchFunctionSubclass", probe=_hides_subclasses)
def without_torch_functions() -> contextlib.AbstractContextManager[Any]:
    """Return a context in which no subclass sees the functions called with it; where there is none they see them."""
    return contextlib.nullcontext()
