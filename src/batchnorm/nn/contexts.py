"""The settings that open contexts make for layers, per thread and asyncio task.

`use_domain`, `no_stat_updates`, `accumulate` and `adapt` keep their settings here, by the keys of layers, and nothing
on the layers themselves: other threads and tasks see none of them, and copies, which get keys of their own, are plain.
"""

from __future__ import annotations

import itertools
import sys
import threading
import types
import weakref
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from typing import Any, NamedTuple

from torch import Tensor

from batchnorm.nn.accumulated import Pool
from batchnorm.torch_internals import TorchBatchNorm

__all__ = ["PLAIN", "Adapted", "InputHook", "LayerContext", "OpenContext", "Setting", "in_force", "new_key"]

InputHook = Callable[[TorchBatchNorm, Tensor, Tensor | None], tuple[Tensor, Tensor] | None]
"""Takes a layer, its input as (N, C, *) and its mask (N, *).

It may return a mean and a variance, with which a layer in eval mode then normalizes this input.
"""


class Adapted(NamedTuple):
    """Statistics (C,) that are used instead of the stored ones of a domain."""

    mean: Tensor
    var: Tensor
    domain: str | None


class Setting(NamedTuple):
    """The setting that one open context makes for one layer.

    Attributes
    ----------
    domain : str or None
        The domain whose running statistics are used; None changes none.
    updates_paused : bool
        Forwards update no running statistics.
    pool : Pool or None
        Takes the moments of micro-batches.
    adapted : Adapted or None
    hook : callable or None
        Is called with every input.
    hides_adaptations : bool
        Adaptations from contexts that were opened earlier are not used.
    """

    domain: str | None = None
    updates_paused: bool = False
    pool: Pool | None = None
    adapted: Adapted | None = None
    hook: InputHook | None = None
    hides_adaptations: bool = False


class LayerContext(NamedTuple):
    """The settings of all open contexts for one layer, for a forward in this thread and task.

    Attributes
    ----------
    domain : str or None
    updates_paused : bool
    pool : Pool or None
    adapted : tuple of (Tensor, Tensor) or None
        The mean and variance that are used instead of the stored ones.
    hooks : tuple of callables
    """

    domain: str | None = None
    updates_paused: bool = False
    pool: Pool | None = None
    adapted: tuple[Tensor, Tensor] | None = None
    hooks: tuple[InputHook, ...] = ()


PLAIN = LayerContext()
"""The settings for a layer outside of all contexts."""

_ENTERED: ContextVar[tuple[OpenContext, ...]] = ContextVar("batchnorm contexts", default=())
_THREAD = threading.local()
_LOCK = threading.Lock()
_NUMBERS = itertools.count()
_open = 0  # contexts of all threads: the lookup is skipped while there is none


def new_key() -> str:
    """Return a key for a layer."""
    return f"layer_{next(_NUMBERS)}"


class OpenContext:
    """A context from `enter` to `leave`. It may be left in any order with others, and from any thread or task.

    Attributes
    ----------
    settings : dict of Setting
        By the keys of layers.
    at_end : list of callables
        Are called once when the context is left.
    """

    def __init__(self, settings: Mapping[str, Setting]) -> None:
        self.settings = dict(settings)
        self.at_end: list[Callable[[], object]] = []
        self.is_open = False
        self.number = next(_NUMBERS)

    def enter(self) -> None:
        """Put the settings in force in this thread or task, and in those that inherit its contextvars."""
        global _open
        with _LOCK:
            _open += not self.is_open
            self.is_open = True
        if self not in _ENTERED.get():
            _ENTERED.set((*_entered(), self))

    def leave(self) -> None:
        """End the settings everywhere; a second call does nothing."""
        global _open
        with _LOCK:
            was_open, self.is_open = self.is_open, False
            _open -= was_open
        if was_open:
            _ENTERED.set(_entered())
            self.narrow()
            for finish in self.at_end:
                finish()

    def stay(self) -> None:
        """Keep the settings in force in this thread after the asyncio task, or a copied context, has ended.

        Notebooks may run each cell in a task or in a copied context of its own. While the task runs, other tasks do not
        have the settings.
        """
        _THREAD.staying = [*_staying(), (self, _current_task())]

    def narrow(self) -> None:
        """Undo `stay`."""
        _THREAD.staying = [(context, task) for context, task in _staying() if context is not self and context.is_open]


def in_force(key: str, compiling: bool = False) -> LayerContext:
    """Return the settings for the layer with the key in this thread and task."""
    if compiling:
        found: LayerContext = getattr(_VIEW, key) if _VIEW.has_contexts else PLAIN
        return found
    return _merged(key) if _open else PLAIN


class _View(types.ModuleType):
    """Attributes that have another value in each thread and task.

    Dynamo cannot trace ContextVar.get. It does read attributes of modules as they are, and its guards read them again
    at each call of the compiled code, in the thread and task of the caller.
    """

    def __getattr__(self, name: str) -> Any:
        if name == "has_contexts":
            return bool(_open and _contexts())
        if name.startswith("layer_"):
            return _merged(name)
        raise AttributeError(name)


_VIEW = _View("batchnorm_contexts_in_force")


def _merged(key: str) -> LayerContext:
    settings = [context.settings[key] for context in _contexts() if key in context.settings]
    if not settings:
        return PLAIN
    settings.reverse()  # the one opened last comes first
    domain = next((each.domain for each in settings if each.domain is not None), None)
    pool = next((each.pool for each in settings if each.pool is not None), None)
    adapted, hooks = None, []
    for each in settings:
        if each.hook is not None:
            hooks.append(each.hook)
        if each.adapted is not None:
            if each.adapted.domain != domain:
                continue
            adapted = each.adapted[:2]
        if each.hides_adaptations:
            break
    return LayerContext(domain, any(each.updates_paused for each in settings), pool, adapted, tuple(reversed(hooks)))


def _contexts() -> tuple[OpenContext, ...]:
    """Return the contexts in force in this thread and task, in the order in which they were made."""
    entered = _entered()
    others = [
        context
        for context, task in _staying()
        if context.is_open and context not in entered and (task is None or task() is None or task().done())
    ]
    return tuple(sorted((*entered, *others), key=lambda context: context.number)) if others else entered


def _entered() -> tuple[OpenContext, ...]:
    return tuple(context for context in _ENTERED.get() if context.is_open)


def _staying() -> list[tuple[OpenContext, Any]]:
    return getattr(_THREAD, "staying", [])


def _current_task() -> weakref.ref[Any] | None:
    """Return a reference to the asyncio task that runs in this thread, if there is one."""
    asyncio = sys.modules.get("asyncio")
    try:
        task = None if asyncio is None else asyncio.current_task()
    except RuntimeError:  # no event loop runs
        return None
    return None if task is None else weakref.ref(task)
