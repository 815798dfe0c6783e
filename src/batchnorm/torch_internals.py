"""Every private name of torch that the library uses, each behind a function that says what it tells.

Private names may change in any release. So none is touched at import: the first call of an `accessor` looks the name up
and tries it on a tiny case. If it works as known here, the object found replaces the function in this module, and later
calls cost no more than the private name itself; call accessors as ``torch_internals.name()``, since a name imported
from here would not be replaced. Otherwise the body of the function gives the answer that turns the fast path off.

torch.compile traces through this module. Code that runs under it must call only the functions that say so; they read
the names directly, and never replace anything.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import threading
import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

if TYPE_CHECKING:
    from torch.nn.modules.batchnorm import _BatchNorm as TorchBatchNorm
    from torch.nn.modules.batchnorm import _LazyNormBase as TorchLazyNorm
else:
    # The public classes have a common base without a public name.
    TorchBatchNorm = next(base for base in nn.BatchNorm1d.__mro__ if issubclass(nn.SyncBatchNorm, base))
    TorchLazyNorm = nn.LazyBatchNorm1d.__bases__[0]

__all__ = [
    "PATHS",
    "TorchBatchNorm",
    "TorchLazyNorm",
    "collectives",
    "collectives_while_compiling",
    "compiled_module",
    "count_dispatch_modes",
    "default_store",
    "dispatch_mode_class",
    "fast_apply",
    "forward_mode_is_active",
    "graph_task_id",
    "has_saved_tensors_hooks",
    "has_storage",
    "interpreter_stack",
    "is_functional",
    "is_functorch_wrapped",
    "is_legacy_batched",
    "is_transformed",
    "is_zero_tensor",
    "jit_tracing_state",
    "may_be_transformed",
    "tensor_guards",
    "traces_pre_dispatch",
    "transforms_are_active",
    "vmap_is_active",
    "without_compile_wrappers",
    "without_modes",
]

PATHS: dict[str, tuple[str, ...]] = {}
"""The private names behind each function of this module."""

_FOUND: set[str] = set()
"""The accessors whose names work as known here."""

_F = TypeVar("_F", bound=Callable[..., Any])


def _look_up(path: str) -> Any:
    """Return the object at a dotted path that begins with ``torch``; import modules on the way."""
    found: Any = torch
    parts = path.split(".")
    for i, part in enumerate(parts[1:], start=2):
        try:
            found = getattr(found, part)
        except AttributeError:
            found = importlib.import_module(".".join(parts[:i]))
    return found


def _works(probe: Callable[[], bool]) -> bool:
    """Return whether the probe passes; it runs in a thread of its own, where no mode or transform is active."""
    passed = []

    def run() -> None:
        with contextlib.suppress(Exception), warnings.catch_warnings(action="ignore"):
            passed.append(probe() is True)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    return passed == [True]


def _find(paths: Sequence[str], make: Callable[..., Any], probe: Callable[[Any], bool]) -> Any:
    """Return what is made of the objects at the paths; None if one is missing or the probe fails."""
    try:
        made = make(*map(_look_up, paths))
    except Exception:  # noqa: BLE001 (a changed torch may raise anything)
        return None
    return made if _works(lambda: probe(made)) else None


def _itself(found: Any) -> Any:
    return found


def accessor(*paths: str, probe: Callable[[Any], bool], make: Callable[..., Any] = _itself) -> Callable[[_F], _F]:
    """Let private names of torch stand in for a function of this module, from its first call on, if they work.

    Parameters
    ----------
    paths : str
        The private names.
    probe : callable
        Tells of what ``make`` returned whether it works as known here.
    make : callable
        Makes the substitute of the objects at the paths; by default it is the single object found.
    """

    def decorate(otherwise: _F) -> _F:
        name = otherwise.__name__
        PATHS[name] = paths
        chosen: list[Any] = []

        @functools.wraps(otherwise)
        def first_call(*arguments: Any) -> Any:
            if not chosen:
                found = _find(paths, make, probe)
                if found is not None:
                    _FOUND.add(name)
                chosen.append(otherwise if found is None else found)
                globals()[name] = chosen[0]
            return chosen[0](*arguments)

        return first_call  # type: ignore[return-value]

    return decorate


# Whether something watches the operations, or must see operators of the library.


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


# Transforms of torch.func and forward-mode differentiation.


def _inside_vmap(tell: Callable[[Tensor], Any]) -> Any:
    """Return what ``tell`` returns of a tensor inside of vmap; vmap is the one transform that imports no compiler."""
    told = []

    def function(x: Tensor) -> Tensor:
        told.append(tell(x))
        return x

    torch.func.vmap(function)(torch.zeros(2))
    return told[0]


def _lists_levels(stack: Callable[[], Any]) -> bool:
    return not stack() and len(_inside_vmap(lambda _: stack())) == 1


@accessor("torch._C._functorch.get_interpreter_stack", probe=_lists_levels)
def interpreter_stack() -> Sequence[Any] | None:
    """Return the active transforms of torch.func, None or empty if there are none; some where torch does not tell."""
    return (None,)


@accessor(
    "torch._C._are_functorch_transforms_active",
    probe=lambda active: active() is False and _inside_vmap(lambda _: active()) is True,
)
def transforms_are_active() -> bool:
    """Return whether a transform of torch.func is active; True where torch does not tell."""
    return bool(interpreter_stack())


@accessor(
    "torch._C._functorch.TransformType",
    make=lambda kinds: lambda: any(level.key() == kinds.Vmap for level in interpreter_stack() or ()),
    probe=lambda active: active() is False and _inside_vmap(lambda _: active()) is True,
)
def vmap_is_active() -> bool:
    """Return whether vmap is among the active transforms; False where torch does not tell."""
    return False


@accessor(
    "torch._C._functorch.is_functorch_wrapped_tensor",
    probe=lambda wrapped: wrapped(torch.zeros(1)) is False and _inside_vmap(wrapped) is True,
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
    return transforms_are_active() and not _FOUND.isdisjoint(("transforms_are_active", "interpreter_stack"))


def _is_transformed_while_compiling() -> bool:
    active = getattr(torch._C, "_are_functorch_transforms_active", None)
    return (active is not None and active()) or getattr(forward_ad, "_current_level", -1) >= 0


def _tells_batches(batched: Callable[[Tensor], bool]) -> bool:
    told = [batched(torch.zeros(1))]

    def tell(dy: Tensor) -> Tensor:
        told.append(batched(dy))
        return dy

    # torch.autograd.grad(..., is_grads_batched=True) does this, but it also imports SymPy, for half a second.
    _look_up("torch._vmap_internals._vmap")(tell)(torch.ones(2, 1))
    return told == [False, True]


@accessor("torch._C._functorch.is_legacy_batchedtensor", probe=_tells_batches)
def is_legacy_batched(values: Tensor) -> bool:
    """Return whether the tensor stands for a batch of gradients (``is_grads_batched=True``); True where unknown."""
    return True


# What a tensor is.


@accessor(
    "torch._C._has_storage",
    probe=lambda has: has(torch.zeros(1)) is True and _inside_vmap(has) is False,
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


# Autograd.


def _nothing() -> None:
    pass


def _graph_task_in_hook(task: Callable[[], int]) -> int:
    """Return what ``task`` returns inside of a backward."""
    told: list[int] = []
    x = torch.ones(1, requires_grad=True)
    y = x * 1
    y.register_hook(lambda _: told.append(task()))  # type: ignore[no-untyped-call]
    y.backward()  # type: ignore[no-untyped-call]
    return told[0]


@accessor(
    "torch._C._current_graph_task_id",
    probe=lambda task: task() == -1 and _graph_task_in_hook(task) >= 0,
)
def graph_task_id() -> int:
    """Return -1 outside of a backward; inside, where activation checkpointing runs forwards again, a number from 0."""
    try:
        # The engine takes a callback only while it runs a backward.
        torch.autograd.Variable._execution_engine.queue_callback(_nothing)
    except RuntimeError:
        return -1
    return 0


def _sees_hooks(on_top: Callable[[], bool]) -> bool:
    outside = on_top()
    with torch.autograd.graph.saved_tensors_hooks(_itself, _itself):
        return on_top() is True and outside is False


@accessor(
    "torch._C._autograd._top_saved_tensors_default_hooks",
    make=lambda top: lambda: top(True) is not None,
    probe=_sees_hooks,
)
def has_saved_tensors_hooks() -> bool:
    """Return whether hooks pack the tensors saved for backward, as checkpointing does; True where unknown."""
    return True


class _Shortcut:
    """A function of autograd that the shortcuts are tried on; made anew for each, since one of them changes it."""

    @staticmethod
    def new() -> type[torch.autograd.Function]:
        class Scaled(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, x: Tensor, other: Tensor | None, factor: float) -> Tensor:
                ctx.save_for_backward(x, other)
                ctx.factor = factor
                return x * factor

            @staticmethod
            def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
                x, other = ctx.saved_tensors
                assert other is None
                return dy * x * ctx.factor, None, None

        return Scaled

    @staticmethod
    def works(apply: Callable[..., Tensor]) -> bool:
        """Return whether y, the gradient and the name of the node are right."""
        x = torch.tensor([5.0], requires_grad=True)
        y = apply(x, None, 3.0)
        node = y.grad_fn
        y.backward()  # type: ignore[no-untyped-call]
        return (
            y.item() == 15.0
            and x.grad is not None
            and x.grad.item() == 15.0
            and node is not None
            and node.name() == "ScaledBackward"
        )


_SINGLE_LEVEL = "torch.autograd.function._SingleLevelFunction"
_BACKWARD_CLASS = "torch.autograd.Function._backward_cls"
PATHS["fast_apply"] = (_SINGLE_LEVEL, _BACKWARD_CLASS)


def _raw_apply(function: type[torch.autograd.Function]) -> Callable[..., Any]:
    """Return the apply of C++ below torch's search for wrapped arguments."""
    return super(_look_up(_SINGLE_LEVEL), function).apply  # type: ignore[no-any-return]


def _shorten_backward(function: type[torch.autograd.Function]) -> None:
    """Let the engine call backward without torch's search for its other forms."""
    if not callable(_look_up(_BACKWARD_CLASS).apply):
        raise TypeError("the class that runs a backward must have an apply to replace")
    function._backward_cls.apply = function.backward  # type: ignore[attr-defined]


@functools.cache
def _shortcuts() -> tuple[bool, bool]:
    """Return whether the raw apply works, and whether backward can be shortened."""

    def backward_works() -> bool:
        function = _Shortcut.new()
        _shorten_backward(function)
        return _Shortcut.works(function.apply)

    return _works(lambda: _Shortcut.works(_raw_apply(_Shortcut.new()))), _works(backward_works)


def fast_apply(function: type[torch.autograd.Function]) -> Callable[..., Any]:
    """Shorten the backward of an autograd Function, and return its apply without a search for wrapped arguments.

    Both searches take a tenth of a small batch's time. The function must define ``backward``, and be applied only where
    no transform of torch.func is active. Keep the result: finding it takes time. Where torch does not work as known
    here it is ``function.apply``.
    """
    raw, backward = _shortcuts()
    if backward:
        _shorten_backward(function)
    return _raw_apply(function) if raw else function.apply


# Modes and modules.


@accessor(
    "torch.utils._python_dispatch.TorchDispatchMode",
    make=lambda mode: lambda: mode,
    probe=lambda get: isinstance(get(), type),
)
def dispatch_mode_class() -> Any:
    """Return the base class of modes that see every operation, or None."""
    return None


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


PATHS["compiled_module"] = ()  # an attribute of instances


def compiled_module(module: nn.Module) -> nn.Module | None:
    """Return the module that ``torch.compile(module)`` wraps, or None."""
    inner = getattr(module, "_orig_mod", None)
    return inner if isinstance(inner, nn.Module) else None


def without_compile_wrappers(path: str) -> str:
    """Return a module path or a key of a state dict without the names that torch.compile's wrappers add to it."""
    return path.replace("_orig_mod.", "")


# torch.distributed.


def _store_or_none(get: Callable[[], Any]) -> Callable[[], Any]:
    def store() -> Any:
        try:
            found = get()
        except Exception:  # noqa: BLE001 (a changed torch may raise anything)
            return None
        return found if isinstance(found, torch.distributed.distributed_c10d.Store) else None

    return store


@accessor(
    "torch.distributed.distributed_c10d._get_default_store",
    make=_store_or_none,
    probe=lambda store: True,  # it needs processes
)
def default_store() -> Any:
    """Return the store that all processes share, or None."""
    return None


def _are_collectives(operators: Any) -> bool:
    return all(callable(getattr(operators, name)) for name in ("all_gather_into_tensor", "all_reduce", "wait_tensor"))


@accessor(
    "torch.ops._c10d_functional", make=lambda operators: lambda: operators, probe=lambda get: _are_collectives(get())
)
def collectives() -> Any:
    """Return the collective operators that torch.compile keeps in its graph, or None."""
    return None


def collectives_while_compiling() -> Any:
    """Return the same under torch.compile, which traces this."""
    return torch.ops._c10d_functional
