"""Forward passes over a loader, and what batch normalization layers see of them."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.parameter import UninitializedBuffer

from batchnorm.errors import InputError
from batchnorm.nn.layer import Layer
from batchnorm.nn.layout import dimension_of_channels
from batchnorm.statistics.moments import Moments
from batchnorm.torch_internals import TorchBatchNorm, compiled_module

__all__ = [
    "Forward",
    "LayerInput",
    "Statistics",
    "forward_pass",
    "inputs_of",
    "kept_variance",
    "restored",
    "running_layers",
    "running_names",
    "running_statistics",
    "samples_of",
    "set_running_statistics",
    "statistics_layers",
    "suffixes_of",
    "uncompiled",
    "unwrapped",
]

Forward = Callable[[nn.Module, Any], object]
Statistics = tuple[Tensor, Tensor]
"""A mean and a variance (C,)."""

LayerInput = Callable[[str, Tensor, Tensor | None], Statistics | None]
"""Takes the path of a layer, its input as (N, C, *) and its mask (N, *); returns what to normalise it with."""


def unwrapped(model: nn.Module) -> nn.Module:
    """The model within torch.compile's wrapper and DistributedDataParallel's."""
    while True:
        if isinstance(model, DistributedDataParallel):
            model = model.module
        elif (inner := compiled_module(model)) is not None:
            model = inner
        else:
            return model


def running_layers(model: nn.Module) -> dict[str, TorchBatchNorm]:
    """The layers with running statistics, ours and torch's, by path.

    Raises
    ------
    InputError
        There is none, or one is lazy and has not seen a batch yet.
    """
    layers = {
        path: layer
        for path, layer in model.named_modules()
        if isinstance(layer, TorchBatchNorm) and layer.running_mean is not None and layer.running_var is not None
    }
    if not layers:
        raise InputError(
            f"the model must have batch normalization layers with running statistics; {type(model).__name__} has none"
        )
    for path, layer in layers.items():
        if isinstance(layer.running_mean, UninitializedBuffer):
            raise InputError(f"{path or 'the layer'} must have seen a batch, which tells a lazy layer its channels")
    return layers


def statistics_layers(model: nn.Module) -> dict[str, TorchBatchNorm]:
    """The layers with running statistics that may be changed, ours and torch's, by path.

    Left out are frozen ones: ours by `freeze`, and torch's in eval mode within a model that is training.

    Raises
    ------
    InputError
        There is none, or one is lazy and has not seen a batch yet.
    """
    layers = running_layers(model)
    kept = {path: layer for path, layer in layers.items() if not _is_frozen(layer, model)}
    if not kept:
        raise InputError("all batch normalization layers of the model are frozen; batchnorm.unfreeze them first")
    return kept


def _is_frozen(layer: TorchBatchNorm, model: nn.Module) -> bool:
    return layer.frozen_statistics if isinstance(layer, Layer) else model.training and not layer.training


def _first(batch: Any) -> Any:
    if isinstance(batch, Mapping):
        return next((value for value in batch.values() if isinstance(value, Tensor)), None)
    return batch[0] if isinstance(batch, tuple | list) and batch else batch


def samples_of(batch: Any) -> int:
    """The number of samples of a batch: the size of its first tensor, or 1 where there is none to be seen."""
    first = _first(batch)
    return first.shape[0] if isinstance(first, Tensor) and first.dim() else 1


def forward_pass(model: nn.Module, batch: Any, forward: Forward | None) -> None:
    """Run the model on one batch of a loader.

    A tensor is the input, of a tuple or list the first element, and of a mapping all values by name, unless
    ``forward(model, batch)`` says otherwise.

    Raises
    ------
    InputError
        The batch is nothing of that, and there is no ``forward``.
    """
    first = _first(batch)
    if forward is not None:
        forward(model, batch)
    elif isinstance(batch, Mapping):
        model(**batch)
    elif isinstance(first, Tensor):
        model(first)
    else:
        raise InputError(
            f"a batch must be a tensor, a tuple or list that begins with one, or mapping; got {type(batch).__name__}. "
            "For others give forward=, a function of model and batch"
        )


def suffixes_of(layer: TorchBatchNorm) -> list[str]:
    """What the names of a layer's statistics end with: nothing, and for each domain its name."""
    return ["", *(f"_{name}" for name in layer.domain_names)] if isinstance(layer, Layer) else [""]


def running_names(layer: TorchBatchNorm) -> tuple[str, str]:
    """The buffers of running mean and variance, of a layer of ours those of its active domain."""
    domain = layer.active_domain if isinstance(layer, Layer) else None
    return ("running_mean", "running_var") if domain is None else (f"running_mean_{domain}", f"running_var_{domain}")


def running_statistics(layer: TorchBatchNorm) -> tuple[Tensor, Tensor]:
    """Running mean and variance, of a layer of ours those of its active domain."""
    mean, var = running_names(layer)
    return layer.get_buffer(mean), layer.get_buffer(var)


@torch.no_grad()
def set_running_statistics(layer: TorchBatchNorm, mean: Tensor, var: Tensor) -> None:
    """Write running mean and variance in place."""
    for buffer, values in zip(running_statistics(layer), (mean, var), strict=True):
        buffer.copy_(values)


def kept_variance(layer: TorchBatchNorm, moments: Moments) -> Tensor:
    """The variance that a layer's running statistics keep of such moments."""
    return moments.var(unbiased=not isinstance(layer, Layer) or layer.unbiased)


def _input_of(layer: nn.Module, arguments: tuple[Any, ...], given: dict[str, Any]) -> tuple[Tensor, Tensor | None]:
    """What a layer is called with: its input as (N, C, *), and its mask (N, *)."""
    names = dict(zip(("input", "residual", "mask"), arguments, strict=False)) | given
    x = names["input"]
    return x.movedim(dimension_of_channels(x, layer.channel_dim) if isinstance(layer, Layer) else 1, 1), names.get(
        "mask"
    )


class _Watched:
    """A layer whose inputs are looked at, and which may use other running statistics for the time of a forward."""

    def __init__(self, path: str, found: LayerInput) -> None:
        self.path, self.found = path, found
        self.stored: dict[str, Tensor] = {}

    def before(self, layer: TorchBatchNorm, arguments: tuple[Any, ...], given: dict[str, Any]) -> None:
        used = self.found(self.path, *_input_of(layer, arguments, given))
        if used is None:
            return
        for name, values in zip(running_names(layer), used, strict=True):
            held = self.stored[name] = layer.get_buffer(name)
            # Ours take float64, and with it a mean that float32 could not hold.
            layer._buffers[name] = values if isinstance(layer, Layer) else values.to(held.dtype)

    def after(self, layer: TorchBatchNorm, *_: object) -> None:
        layer._buffers.update(self.stored)
        self.stored.clear()


@contextmanager
def inputs_of(layers: Mapping[str, TorchBatchNorm], found: LayerInput) -> Iterator[None]:
    """Call ``found(path, x, mask)`` at every input of the layers, before they run.

    Where it returns a mean and a variance, a layer in eval mode normalises this input with these.
    """
    with ExitStack() as hooks:
        for path, layer in layers.items():
            watched = _Watched(path, found)
            hooks.callback(layer.register_forward_pre_hook(watched.before, with_kwargs=True).remove)
            hooks.callback(layer.register_forward_hook(watched.after, always_call=True).remove)
        yield


@contextmanager
def uncompiled() -> Iterator[None]:
    """Run what torch.compile has compiled as it is written, since compiled code knows nothing of new hooks."""
    if "torch._dynamo" not in sys.modules:
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield


@contextmanager
def restored(model: nn.Module) -> Iterator[None]:
    """Put the mode of every module and the state of the random generators back, whatever happens."""
    modes = {module: module.training for module in model.modules()}
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002 (the global one is what others use)
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training
        random.setstate(states[0])
        np.random.set_state(states[1])  # noqa: NPY002
        torch.set_rng_state(states[2])
        if cuda:
            torch.cuda.set_rng_state_all(cuda)
