"""Layers of ours in the place of those of any library: each layer stays the object that it is, and changes its class.

So whatever refers to a layer goes on: the names and places of the model, hooks and their handles, lists, optimizers.
torch's lazy layers and parametrizations change the class of a module likewise.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from batchnorm.errors import InputTypeError
from batchnorm.nn.options import Options, checked_numbers, checked_options
from batchnorm.surgery.conversion.changes import NUMBERS, OPTIONS, Conversion, decide, kind_of
from batchnorm.surgery.opening import COPIES, batch_norms, check_model, copied
from batchnorm.surgery.report import Left, Replacement, Surgery

__all__ = ["convert"]

FROZEN = "frozen layers had gamma and beta as buffers, which are frozen parameters now; batchnorm.unfreeze trains them."


def convert(model: nn.Module, inplace: bool = False, **options: Any) -> tuple[nn.Module, Surgery]:
    """Turn the batch normalization layers of a model, of any library, into batchnorm's.

    It converts torch's BatchNorm1d, 2d and 3d, lazy ones, SyncBatchNorm (``sync=True``), the FrozenBatchNorm2d of
    torchvision, detectron2 and transformers (as frozen layers), timm's BatchNormAct2d, and other classes that compute
    batch normalization, alone or with an activation behind it. A forward that is not torch's is measured on random
    inputs first. Outputs, gradients and running statistics stay those of the model, in eval and in train mode.

    Names, hooks, parametrizations, pruning, dtypes, devices, modes, ``requires_grad``, attributes and layers in several
    places are kept, and state dicts load strictly both ways. Running statistics of fewer than 32 bits become float32.

    Parameters
    ----------
    model : Module
        A model, or a layer.
    inplace : bool
        Convert the layers of the model given, with the same parameters and buffers, so that an optimizer keeps working.
    **options
        Options of the layers, as ``small_batch="running"``, also for those that are batchnorm's already; and eps and
        momentum.

    Returns
    -------
    tuple of Module and Surgery
        The model, by default a deep copy, and a report of the layers converted and of those left alone.

    Raises
    ------
    InputError
        The model has no batch normalization layer, or an option is out of its range.
    InputTypeError
        It is no module, or there is no such option.
    UnsupportedError
        It is in a wrapper (DistributedDataParallel, FSDP, torch.compile), TorchScript, or quantized.

    Examples
    --------
    >>> import batchnorm as bn, torch
    >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8))
    >>> model, report = bn.convert(model, small_batch="running")
    >>> type(model[1]) is bn.BatchNorm2d, model[1].small_batch
    (True, 'running')
    >>> report
    Surgery(1 layer changed)
    """
    _check(options)
    check_model(model, "convert")
    layers = batch_norms(model, "convert")
    changes: dict[str, Conversion] = {}
    left = []
    for path, layer in layers.items():
        decided = decide(layer, options)
        if isinstance(decided, str):
            left.append(Left(path, kind_of(layer), decided))
        else:
            changes[path] = decided
    done = [
        Replacement(path, kind_of(layers[path]), change.described(layers[path])) for path, change in changes.items()
    ]
    notes = [] if inplace or not any(True for _ in model.parameters()) else [COPIES]
    frozen = [
        path for path, change in changes.items() if change.frozen and layers[path]._buffers.get("weight") is not None
    ]
    if frozen:
        notes.append(f"{len(frozen)} {FROZEN}")
    if not inplace:
        model = copied(model, "convert")
    for path, change in changes.items():
        change.apply(model.get_submodule(path))
    return model, Surgery(tuple(done), tuple(left), notes=tuple(notes))


def _check(options: Mapping[str, Any]) -> None:
    unknown = sorted(options.keys() - {*OPTIONS, *NUMBERS})
    if unknown:
        raise InputTypeError(f"convert takes the options {', '.join((*NUMBERS, *OPTIONS))}; got {', '.join(unknown)}")
    checked_options(Options(**{name: options[name] for name in OPTIONS if name in options}), track_running_stats=True)
    checked_numbers(0, options.get("eps", 1e-5), options.get("momentum", 0.1))
