"""Modes and tracers, which must see operators instead of calls of the kernels."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import nn

from batchnorm.torch_internals.lookup import accessor

__all__ = [
    "compiled_module",
    "constant_while_compiling",
    "count_dispatch_modes",
    "dispatch_mode_class",
    "is_exporting",
    "jit_tracing_state",
    "traces_pre_dispatch",
    "without_compile_wrappers",
    "without_modes",
]

_F = TypeVar("_F", bound=Callable[..., Any])


@accessor(
    "torch.utils._python_dispatch.TorchDispatchMode",
    make=lambda mode: lambda: mode,
    probe=lambda get: isinstance(get(), type),
)
def dispatch_mode_class() -> Any:
    """Return the base class of modes that see every operation, or None."""
    return None


def _counts_modes(count: Callable[[], int]) -> bool:
    mode = dispatch_mode_class()

    class Watching(mode):  # type: ignore[misc, valid-type]
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            return func(*args, **(kwargs or {}))

    outside = count()
    with Watching():
        return (outside, count()) == (0, 1)


@accessor("torch._C._len_torch_dispatch_stack", probe=_counts_modes)
def count_dispatch_modes() -> int:
    """Return the number of active dispatch modes; 1 where torch does not tell."""
    return 1


@accessor(
    "torch._C._dispatch_tls_is_dispatch_key_included",
    "torch._C.DispatchKey",
    make=lambda is_included, keys: functools.partial(is_included, keys.PreDispatch),
    probe=lambda included: included() is False,
)
def traces_pre_dispatch() -> bool:
    """Return whether a tracer is active that sees operations before autograd does; True where torch does not tell."""
    return True


@accessor(
    "torch._C._get_tracing_state",
    probe=lambda state: state() is None,
)
def jit_tracing_state() -> Any:
    """Return None unless torch.jit.trace is at work."""
    return True if torch.jit.is_tracing() else None  # type: ignore[attr-defined, no-untyped-call]


def _suspends_modes(without: Callable[[], Any]) -> bool:
    seen: list[Any] = []

    class Watching(dispatch_mode_class()):  # type: ignore[misc]
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(func)
            return func(*args, **(kwargs or {}))

    x = torch.ones(1)
    with Watching():
        with without():
            x.add(1)
        unseen = not seen
        x.add(1)
    return unseen and bool(seen)


@accessor("torch.utils._python_dispatch._disable_current_modes", probe=_suspends_modes)
def without_modes() -> contextlib.AbstractContextManager[Any]:
    """Return a context in which no dispatch mode sees operations; where there is none the modes see them."""
    return contextlib.nullcontext()


def compiled_module(module: nn.Module) -> nn.Module | None:
    """Return the module that ``torch.compile(module)`` wraps, or None."""
    inner = getattr(module, "_orig_mod", None)
    return inner if isinstance(inner, nn.Module) else None


def is_exporting() -> bool:
    """Return whether torch.export records this call; torch.compile may trace this.

    In a graph of torch.compile, the public function of torch 2.10 returns True as well.
    """
    flag = getattr(torch.compiler, "_is_exporting_flag", None)
    return torch.compiler.is_exporting() if flag is None else flag


def constant_while_compiling(function: _F) -> _F:
    """Let torch.compile call the function, which returns a constant, instead of tracing it.

    ``torch.compiler.assume_constant_result`` does this, and imports the compiler. A torch that does not know the mark
    traces the function.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def without_compile_wrappers(path: str) -> str:
    """Return a module path or a key of a state dict without the names that torch.compile's wrappers add to it."""
    return path.replace("_orig_mod.", "")
