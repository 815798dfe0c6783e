"""Torch's own layers within contexts, each through a class of its own while a context is open.

The class asks `contexts` at each forward. The layer's attributes and buffers stay as they are, other threads see none
of it, and copies and pickles are of torch's class. torch's parametrizations change the class of a module likewise.
"""

from __future__ import annotations

import sys
import threading
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from batchnorm import torch_internals
from batchnorm.errors import warn
from batchnorm.nn import contexts, exporting
from batchnorm.nn.contexts import PLAIN, LayerContext, LayerKey
from batchnorm.nn.filling import STATISTICS, filling, is_filling
from batchnorm.torch_internals import TorchBatchNorm

__all__ = ["context_of", "follow_contexts", "key_of", "unfollow_contexts", "warn_of_pause"]

_LOCK = threading.RLock()
_CLASSES: WeakKeyDictionary[TorchBatchNorm, type[TorchBatchNorm]] = WeakKeyDictionary()
_USES: WeakKeyDictionary[TorchBatchNorm, int] = WeakKeyDictionary()


def follow_contexts(layer: TorchBatchNorm) -> None:
    """Let the forward of a layer of torch's follow open contexts."""
    with _LOCK:
        followed = _CLASSES.get(layer)
        if followed is None or type(layer) not in followed.__mro__:
            followed = _CLASSES[layer] = _following(type(layer))
        followed._contexts_tracks = layer.__dict__["track_running_stats"]  # type: ignore[attr-defined]
        _USES[layer] = _USES.get(layer, 0) + 1
        if _USES[layer] == 1:
            layer.__class__ = followed


def key_of(layer: TorchBatchNorm) -> LayerKey:
    """Return the key of a layer that follows contexts."""
    return type(layer)._contexts_key  # type: ignore[attr-defined, no-any-return]


def unfollow_contexts(layer: TorchBatchNorm) -> None:
    """Undo one call of `follow_contexts`."""
    with _LOCK:
        _USES[layer] -= 1
        if _USES[layer] == 0:
            del _USES[layer]
            if type(layer) is _CLASSES[layer]:
                layer.__class__ = type(layer).__mro__[1]


def context_of(layer: TorchBatchNorm) -> LayerContext:
    """Return the settings that are in force for a layer of torch's in this thread and task."""
    key = getattr(type(layer), "_contexts_key", None)
    return PLAIN if key is None else contexts.in_force(key, torch.compiler.is_compiling())


def warn_of_pause(change: str) -> None:
    """Warn that a change of running statistics is ignored within a context that promises to leave them."""
    warn(f"{change} leaves running statistics as they are within batchnorm.no_stat_updates and batchnorm.adapt")


def _as_stored(values: Tensor, stored: Tensor | None) -> Tensor:
    """Return adapted statistics in the dtype and on the device of the stored ones."""
    return values if stored is None else values.to(stored)


def _is_read_for_a_forward(layer: TorchBatchNorm) -> bool:
    """Return whether an attribute is read in the layer's own forward, or by TorchScript, which compiles that."""
    if torch.compiler.is_compiling():
        return True
    frame = sys._getframe(2)  # the reader of the property
    while frame is not None:
        code = frame.f_code
        if code.co_name == "forward" and code.co_argcount and frame.f_locals.get(code.co_varnames[0]) is layer:
            return True
        if frame.f_globals.get("__name__") == "torch.jit._recursive":
            return True
        frame = frame.f_back  # type: ignore[assignment]
    return False


def _following(original: Any) -> type[TorchBatchNorm]:
    """Return a class for one layer, which behaves as the original outside of contexts."""

    class Following(original):  # type: ignore[misc]
        _contexts_key = LayerKey()
        _contexts_tracks = True  # the layer's own setting, which dynamo before torch 2.13 cannot read past the property
        __jit_unused_properties__ = ("track_running_stats",)  # torch.jit.script takes the attribute

        def __getattr__(self, name: str) -> Any:
            if name in ("running_mean", "running_var"):
                adapted = context_of(self).adapted
                if adapted is not None:
                    return _as_stored(adapted[0 if name == "running_mean" else 1], self._buffers[name])
            return original.__getattr__(self, name)

        def __setattr__(self, name: str, value: Any) -> None:
            if name in STATISTICS and not is_filling() and context_of(self).updates_paused:
                warn_of_pause(f"setting {name}")
            else:
                original.__setattr__(self, name, value)

        def _load_from_state_dict(self, *arguments: Any) -> None:
            with filling():  # with assign=True it sets attributes
                original._load_from_state_dict(self, *arguments)

        def reset_running_stats(self) -> None:
            if context_of(self).updates_paused:
                warn_of_pause("reset_running_stats()")
            else:
                original.reset_running_stats(self)

        @property
        def track_running_stats(self) -> bool:
            """Torch's setting; while updates are paused, the layer's forward finds False, and so uses no buffers."""
            tracks = type(self)._contexts_tracks
            return tracks and not (context_of(self).updates_paused and _is_read_for_a_forward(self))

        @track_running_stats.setter
        def track_running_stats(self, value: bool) -> None:
            self.__dict__["track_running_stats"] = value
            type(self)._contexts_tracks = value

        def __call__(self, input: Tensor, *args: Any, **kwargs: Any) -> Any:  # noqa: A002 (torch's name for it)
            found, hooks = None, context_of(self).hooks
            if hooks and torch_internals.jit_tracing_state() is not None:
                exporting.refuse_context(context_of(self), "torch.jit.trace")
            for hook in hooks:
                found = hook(self, input, None) or found
            layer = self if found is None else self._with_statistics(*found)
            return original.__call__(layer, input, *args, **kwargs)  # super() fails once the class is torch's again

        def _with_statistics(self, mean: Tensor, var: Tensor) -> TorchBatchNorm:
            """Return a layer of torch's that shares all but its statistics with this one."""
            layer: TorchBatchNorm = original.__new__(original)
            buffers = dict(self._buffers)
            for name, values in (("running_mean", mean), ("running_var", var)):
                buffers[name] = _as_stored(values, buffers[name])
            layer.__dict__.update(self.__dict__, _buffers=buffers)
            tracks = type(self)._contexts_tracks and not context_of(self).updates_paused
            layer.__dict__["track_running_stats"] = tracks
            return layer

        def __prepare_scriptable__(self) -> TorchBatchNorm:
            exporting.refuse_context(context_of(self), "TorchScript")
            return original.__prepare_scriptable__(self) if hasattr(original, "__prepare_scriptable__") else self

        def __reduce_ex__(self, _protocol: Any) -> Any:
            return object.__new__, (original,), self.__getstate__()

    if hasattr(original, "__deepcopy__"):  # parametrized modules have one, which makes another of the same class

        def deepcopy(layer: Any, memo: Any) -> Any:
            twin = original.__deepcopy__(layer, memo)
            if type(twin) is Following:
                twin.__class__ = original
            return twin

        Following.__deepcopy__ = deepcopy
    for name in ("__module__", "__name__", "__qualname__", "__doc__"):
        setattr(Following, name, getattr(original, name))
    return Following
