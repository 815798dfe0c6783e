"""The layers of a model whose running statistics can be read or changed."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.parameter import UninitializedBuffer

from batchnorm.errors import InputError
from batchnorm.nn import running
from batchnorm.nn.recognition import describe_lack
from batchnorm.statistics.moments import Moments
from batchnorm.torch_internals import TorchBatchNorm, compiled_module

__all__ = ["Layers", "Statistics", "loaded", "running_layers", "unfrozen_layers", "unwrapped", "variance_to_keep"]

Layers = dict[str, TorchBatchNorm]
"""Layers by module path."""

Statistics = tuple[Tensor, Tensor]
"""A mean and a variance (C,)."""


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the model inside the wrappers of torch.compile and DistributedDataParallel."""
    while True:
        if isinstance(model, DistributedDataParallel):
            model = model.module
        elif (inner := compiled_module(model)) is not None:
            model = inner
        else:
            return model


def loaded(model: nn.Module) -> nn.Module:
    """Return the model inside its wrappers, to be run.

    Raises
    ------
    InputError
        A parameter or buffer is on the meta device, where it has no values.
    """
    model = unwrapped(model)
    for path, module in model.named_modules():
        if "forward" not in vars(module):  # else it may get its values there, as modules that accelerate offloads do
            for name, values in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
                _check_loaded(f"{path}{path and '.'}{name}", values)
    return model


def _check_loaded(name: str, values: Tensor) -> None:
    if values.is_meta:
        raise InputError(
            f"the model must be loaded; got {name} on the meta device, where it has no values. Load a checkpoint, or "
            "build the model on another device"
        )


def running_layers(model: nn.Module) -> Layers:
    """Return the layers with running statistics, ours and torch's.

    Raises
    ------
    InputError
        There is none, one is lazy and has not seen a batch yet, or one is on the meta device.
    """
    layers = running.running_layers(model)
    if not layers:
        raise InputError(
            f"the model must have batch normalization layers with running statistics; {describe_lack(model)}"
        )
    for path, layer in layers.items():
        if isinstance(layer.running_mean, UninitializedBuffer):
            raise InputError(f"{path or 'the layer'} is lazy and must have seen a batch, which sets its channels")
        for name, values in layer.named_buffers():
            _check_loaded(f"{path}{path and '.'}{name}", values)
    return layers


def unfrozen_layers(model: nn.Module) -> Layers:
    """Return the layers with running statistics that may be changed, ours and torch's.

    Frozen ones are left out: ours by `freeze`, and torch's in eval mode within a model that is training.

    Raises
    ------
    InputError
        There is none, or one is lazy and has not seen a batch yet.
    """
    layers = {path: layer for path, layer in running_layers(model).items() if not running.is_frozen(layer, model)}
    if not layers:
        raise InputError("all batch normalization layers of the model are frozen; call batchnorm.unfreeze first")
    return layers


def variance_to_keep(layer: TorchBatchNorm, moments: Moments) -> Tensor:
    """Return the variance that the layer's running statistics keep: the unbiased or the biased one."""
    return moments.var(unbiased=running.keeps_unbiased_variance(layer))
