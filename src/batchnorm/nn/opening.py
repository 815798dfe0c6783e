"""Opening of contexts for layers, ours and torch's."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager

from batchnorm.nn import stock
from batchnorm.nn.contexts import LayerKey, OpenContext, Setting
from batchnorm.nn.running import RunningBuffers
from batchnorm.torch_internals import TorchBatchNorm

__all__ = ["change_setting", "end_with_layers", "open_context", "settings"]


def open_context(chosen: Mapping[TorchBatchNorm, Setting]) -> OpenContext:
    """Open a context with a setting for each layer in this thread and task, which lasts until its ``leave()``.

    It holds no reference to the layers.
    """
    at_end = []
    for layer in chosen:
        if not isinstance(layer, RunningBuffers):
            stock.follow_contexts(layer)
            at_end.append(_unfollowing(layer))
    context = OpenContext({_key(layer): setting for layer, setting in chosen.items()})
    context.at_end += at_end
    context.enter()
    return context


@contextmanager
def settings(chosen: Mapping[TorchBatchNorm, Setting]) -> Iterator[OpenContext]:
    """Open a context with a setting for each layer until the end of the block."""
    context = open_context(chosen)
    try:
        yield context
    finally:
        context.leave()


def change_setting(context: OpenContext, layer: TorchBatchNorm, setting: Setting) -> None:
    """Change the setting that an open context makes for a layer."""
    context.settings[_key(layer).name] = setting


def end_with_layers(context: OpenContext, layers: Iterable[TorchBatchNorm]) -> None:
    """Drop the setting for each layer when the layer is deleted, and leave the context when all are."""
    for layer in layers:
        finalizer = weakref.finalize(layer, _drop, context, _key(layer).name)
        finalizer.atexit = False
        context.at_end.append(finalizer.detach)


def _drop(context: OpenContext, name: str) -> None:
    context.settings.pop(name, None)
    if not context.settings:
        context.leave()


def _key(layer: TorchBatchNorm) -> LayerKey:
    return layer.step_state.key if isinstance(layer, RunningBuffers) else stock.key_of(layer)


def _unfollowing(layer: TorchBatchNorm) -> Callable[[], None]:
    reference = weakref.ref(layer)

    def unfollow() -> None:
        followed = reference()
        if followed is not None:
            stock.unfollow_contexts(followed)

    return unfollow
