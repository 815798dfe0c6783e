"""Hooks that read the inputs of layers in forward passes, and the state of a model that such passes restore."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from batchnorm.nn.running import RunningSet, active_set, channels_second
from batchnorm.statistics.layers import Layers, Statistics
from batchnorm.torch_internals import TorchBatchNorm

__all__ = ["InputHook", "restored", "uncompiled", "with_input_hook"]

InputHook = Callable[[str, Tensor, Tensor | None], Statistics | None]
"""Takes the module path of a layer, its input as (N, C, *) and its mask (N, *).

It may return a mean and a variance, with which a layer in eval mode then normalizes this input.
"""


def _input_and_mask(layer: TorchBatchNorm, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Any]:
    """Return the input as (N, C, *) and the mask (N, *) or None that a layer is called with."""
    given = dict(zip(("input", "residual", "mask"), args, strict=False)) | kwargs
    return channels_second(layer, given["input"]), given.get("mask")


class _HookedLayer:
    """Hooks of one layer, which may replace its running statistics for the duration of a forward."""

    def __init__(self, path: str, hook: InputHook) -> None:
        self.path, self.hook = path, hook
        self.replaced: tuple[RunningSet, Statistics] | None = None

    def before(self, layer: TorchBatchNorm, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        statistics = self.hook(self.path, *_input_and_mask(layer, args, kwargs))
        if statistics is not None:
            running = active_set(layer)
            self.replaced = running, (running.mean, running.var)
            running.replace(*statistics)

    def after(self, *_: object) -> None:
        if self.replaced is not None:
            running, stored = self.replaced
            running.replace(*stored)
            self.replaced = None


@contextmanager
def with_input_hook(layers: Layers, hook: InputHook) -> Iterator[None]:
    """Call the hook at every input of the layers, before they run."""
    with ExitStack() as stack:
        for path, layer in layers.items():
            hooked = _HookedLayer(path, hook)
            stack.callback(hooked.after)  # torch calls no hook after a KeyboardInterrupt
            stack.callback(layer.register_forward_pre_hook(hooked.before, with_kwargs=True).remove)
            stack.callback(layer.register_forward_hook(hooked.after, always_call=True).remove)
        yield


@contextmanager
def uncompiled() -> Iterator[None]:
    """Run compiled models eagerly, because compiled code does not see new hooks."""
    if "torch._dynamo" not in sys.modules:
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield


@contextmanager
def restored(model: nn.Module) -> Iterator[None]:
    """Restore the mode of every module and the state of the random generators at the end, also after an error."""
    modes = {module: module.training for module in model.modules()}
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002 (transforms draw from the global generator)
    cpu = torch.get_rng_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002
        torch.set_rng_state(cpu)
        if cuda:
            torch.cuda.set_rng_state_all(cuda)
