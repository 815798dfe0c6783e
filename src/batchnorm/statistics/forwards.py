"""Forward passes over the batches of a loader, and hooks that read the inputs of layers."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from batchnorm.errors import InputTypeError
from batchnorm.nn.running import RunningSet, active_set, channels_second
from batchnorm.statistics.layers import Layers, Statistics
from batchnorm.torch_internals import TorchBatchNorm

__all__ = ["Forward", "InputHook", "forward_pass", "number_of_samples", "restored", "uncompiled", "with_input_hook"]

Forward = Callable[[nn.Module, Any], object]
"""Runs a model on one batch of a loader."""

InputHook = Callable[[str, Tensor, Tensor | None], Statistics | None]
"""Takes the module path of a layer, its input as (N, C, *) and its mask (N, *).

It may return a mean and a variance, with which a layer in eval mode then normalizes this input.
"""


def _first(batch: Any) -> Any:
    """Return the first tensor of a mapping, the first element of a tuple or list, or the batch itself."""
    if isinstance(batch, Mapping):
        return next((value for value in batch.values() if isinstance(value, Tensor)), None)
    return batch[0] if isinstance(batch, tuple | list) and batch else batch


def number_of_samples(batch: Any) -> int:
    """Return the size of the batch's first tensor; 1 if it has none."""
    first = _first(batch)
    return first.shape[0] if isinstance(first, Tensor) and first.dim() else 1


def forward_pass(model: nn.Module, batch: Any, forward: Forward | None) -> None:
    """Run the model on one batch of a loader.

    The model is given a tensor as it is, the first element of a tuple or list, and all values of a mapping by name,
    unless ``forward(model, batch)`` does it.

    Raises
    ------
    InputTypeError
        The batch is none of these, and there is no ``forward``.
    """
    first = _first(batch)
    if forward is not None:
        forward(model, batch)
    elif isinstance(batch, Mapping):
        model(**batch)
    elif isinstance(first, Tensor):
        model(first)
    else:
        raise InputTypeError(
            "a batch must be a tensor, a tuple or list that begins with one, or a mapping; got "
            f"{type(batch).__name__}. For other batches pass forward=, a function of model and batch"
        )


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
