"""The settings that open contexts make for layers, per thread and asyncio task.

`use_domain`, `no_stat_updates`, `accumulate` and `adapt` keep their settings here, by the keys of layers, and nothing
on the layers themselves: other threads and tasks see none of them, and copies, which get keys of their own, are plain.
"""

from __future__ import annotations

import hashlib
import itertools
import sys
import threading
import types
import weakref
from collections.abc import Callable, Collection, Mapping
from contextvars import ContextVar
from typing import Any, NamedTuple

from torch import Tensor

from batchnorm.nn.accumulated import Pool
from batchnorm.torch_internals import TorchBatchNorm

__all__ = ["OPEN", "PLAIN", "Adapted", "InputHook", "LayerContext", "LayerKey", "OpenContext", "Setting", "in_force"]

InputHook = Callable[[TorchBatchNorm, Tensor, Tensor | None], tuple[Tensor, Tensor] | None]
"""A function of a layer, its input as (N, C, *) and its mask (N, *).

It may return a mean and a variance, with which a layer in eval mode then normalizes this input.
"""


class LayerKey:
    """Identifies a layer to contexts; a copy of the layer gets another key.

    Attributes
    ----------
    name : str
    groups : dict of str
        The groups of the open contexts that this layer is in. Compiled code of equal blocks is the same for all layers
        of such a group, where it would be compiled anew for each name. The groups of contexts that have been left are
        dropped when the next one is entered.
    """

    def __init__(self) -> None:
        self.name = f"layer_{next(_NUMBERS)}"
        self.groups: dict[str, None] = {}


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
        Forwards update no running statistics; with `adapted`, none of its domain.
    pool : Pool or None
        The pool that takes the moments of micro-batches.
    adapted : Adapted or None
    hook : callable or None
        A function that is called with every input.
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
_LOCK = threading.RLock()  # a deleted layer may end a context at any moment
_NUMBERS = itertools.count()
OPEN: dict[int, str | None] = {}
"""The groups of the open contexts of all threads. While there is none, nothing is looked up."""


class OpenContext:
    """A context from `enter` to `leave`. It may be left in any order with others, and from any thread or task.

    Attributes
    ----------
    settings : dict of Setting
        By the names of layers.
    group : str or None
        The group of the layers, if all have the same setting.
    at_end : list of callables
        Are called once when the context is left.
    """

    def __init__(self, settings: Mapping[LayerKey, Setting]) -> None:
        self.settings = {key.name: setting for key, setting in settings.items()}
        self.group = _group(settings) if _are_same(settings.values()) else None
        self._keys = () if self.group is None else tuple(settings)
        self.at_end: list[Callable[[], object]] = []
        self.is_open = False
        self.number = next(_NUMBERS)

    def enter(self) -> None:
        """Put the settings in force in this thread or task, and in those that inherit its contextvars."""
        with _LOCK:
            self.is_open = True
            OPEN[self.number] = self.group
            self._join()
        if self not in _ENTERED.get():
            _ENTERED.set((*_entered(), self))

    def leave(self) -> None:
        """End the settings everywhere; a second call does nothing."""
        with _LOCK:
            was_open, self.is_open = self.is_open, False
            OPEN.pop(self.number, None)
        if was_open:
            _ENTERED.set(tuple(_entered()))
            self.narrow()
            self.settings = {}  # a handle that is kept keeps none of their tensors
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
        _THREAD.staying = [each for each in _staying() if each[0] is not self]

    def leave_if_hidden(self) -> None:
        """Leave, if later contexts in this thread and task hide each of the adaptations."""
        found = _contexts()
        later = [each.settings for each in found if each.number > self.number]
        if self in found and all(
            any(name in each and _hides(each[name], setting) for each in later)
            for name, setting in self.settings.items()
        ):
            self.leave()

    def _join(self) -> None:
        still_open = set(OPEN.copy().values())  # a copy, as a deleted layer may end a context meanwhile
        for key in self._keys:
            for group in tuple(key.groups):
                if group not in still_open:
                    del key.groups[group]
            if self.group is not None:
                key.groups[self.group] = None


def _are_same(settings: Collection[Setting]) -> bool:
    """Return whether all settings are the same and nothing in them belongs to one layer."""
    first = next(iter(settings), None)
    if first is None or first.pool is not None or first.hook is not None or first.hides_adaptations:
        return False
    return all(each is first for each in settings)


def _hides(later: Setting, setting: Setting) -> bool:
    if not later.hides_adaptations or later.adapted is None:
        return later.hides_adaptations
    return setting.adapted is not None and setting.adapted.domain == later.adapted.domain


def _group(keys: Collection[LayerKey]) -> str:
    """Return a name that is the same for each context of these layers, as compiled code knows the group by it."""
    names = " ".join(sorted(key.name for key in keys))
    return f"group_{hashlib.sha256(names.encode()).hexdigest()}"


def in_force(key: LayerKey, compiling: bool = False) -> LayerContext:
    """Return the settings for a layer in this thread and task."""
    if compiling:
        return _traced(key) if _VIEW.has_contexts else PLAIN
    return _merged(key.name) if OPEN else PLAIN


def _traced(key: LayerKey) -> LayerContext:
    group, context = _VIEW.shared
    if group is None:
        context = getattr(_VIEW, key.name)
    elif group not in key.groups:
        context = PLAIN
    return context  # type: ignore[no-any-return]


class _View(types.ModuleType):
    """Attributes that have another value in each thread and task.

    Dynamo cannot trace ContextVar.get. It does read attributes of modules as they are, and its guards read them again
    at each call of the compiled code, in the thread and task of the caller.
    """

    def __getattr__(self, name: str) -> Any:
        if name == "has_contexts":
            return bool(OPEN and _contexts())
        if name == "shared":
            return _shared()
        if name.startswith("layer_"):
            return _merged(name)
        raise AttributeError(name)


_VIEW = _View("batchnorm_contexts_in_force")


# Compiled code calls the functions below for its inputs, and dynamo looks at each of their frames: it skips those
# without tensors among the arguments, and refuses generators.


def _merged(name: str) -> LayerContext:
    settings = [context.settings.get(name) for context in _contexts()]
    found = [setting for setting in settings if setting is not None]
    if not found:
        return PLAIN
    domain, pool = None, None
    for setting in found:  # in the order of opening
        domain = setting.domain or domain
        pool = pool if setting.pool is None else setting.pool
    paused = any([each.updates_paused and _concerns(each, domain) for each in found])  # noqa: C419
    adapted: tuple[Tensor, Tensor] | None = None
    hooks: list[InputHook] = []
    for setting in reversed(found):
        if setting.hook is not None:
            hooks.insert(0, setting.hook)
        if setting.adapted is not None:
            if setting.adapted.domain != domain:
                continue
            adapted = setting.adapted[:2]
        if setting.hides_adaptations:
            break
    return LayerContext(domain, paused, pool, adapted, tuple(hooks))


def _concerns(setting: Setting, domain: str | None) -> bool:
    return setting.adapted is None or setting.adapted.domain == domain


def _shared() -> tuple[str | None, LayerContext]:
    """Return the group of layers that all contexts in force are for, and their settings; None where they differ."""
    found = _contexts()
    groups = {context.group for context in found}
    name = next(iter(found[0].settings), None) if len(groups) == 1 else None
    if name is None or None in groups:  # or another thread has left the only context
        return None, PLAIN
    return found[0].group, _merged(name)


def _contexts() -> list[OpenContext]:
    """Return the contexts in force in this thread and task, in the order in which they were made."""
    found = _entered()
    others = [context for context, task in _staying() if context not in found and _has_ended(task)]
    if others:
        found = sorted([*found, *others], key=_number)
    return found


def _entered() -> list[OpenContext]:
    return [context for context in _ENTERED.get() if context.is_open]


def _number(context: OpenContext) -> int:
    return context.number


def _has_ended(task: weakref.ref[Any] | None) -> bool:
    found = None if task is None else task()
    return found is None or found.done()


def _staying() -> list[tuple[OpenContext, weakref.ref[Any] | None]]:
    return [each for each in getattr(_THREAD, "staying", ()) if each[0].is_open]


def _current_task() -> weakref.ref[Any] | None:
    """Return a reference to the asyncio task that runs in this thread, if there is one."""
    asyncio = sys.modules.get("asyncio")
    try:
        task = None if asyncio is None else asyncio.current_task()
    except RuntimeError:  # no event loop runs
        return None
    return None if task is None else weakref.ref(task)
