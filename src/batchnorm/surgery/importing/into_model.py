"""Layers of another library, put into a model of torch's; and the arrays of a model for another library."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from batchnorm.errors import InputError, InputTypeError
from batchnorm.nn import BatchNorm
from batchnorm.nn.layer import Layer
from batchnorm.statistics.changes import layer_name
from batchnorm.surgery.conversion.changes import ALREADY, Conversion, decide, kind_of
from batchnorm.surgery.importing.foreign import PARAMETERS, ForeignNorm, Library, call_order, to_array
from batchnorm.surgery.opening import COPIES, batch_norms, check_model, copied, is_lazy
from batchnorm.surgery.report import Left, Replacement, Surgery

__all__ = ["Names", "arrays_of", "import_into", "named_layers", "single_layer"]

Names = Mapping[str, str] | Literal["order"] | None


def single_layer(found: list[ForeignNorm]) -> BatchNorm:
    """Return the only layer as one of ours, with the parameters that it has there."""
    if len(found) > 1:
        raise InputError(
            f"source must be a single layer where no model is given; got {len(found)}, the first {found[0].name!r}. "
            "Give the model that takes them, and names"
        )
    (norm,) = found
    channels = norm.values["running_mean"].numel()
    dtype = next(iter(norm.values.values())).dtype
    layer = BatchNorm(channels, affine=any(name in norm.values for name in PARAMETERS), dtype=dtype, unbiased=False)
    for name in PARAMETERS:
        if name not in norm.values:
            layer.register_parameter(name, None)
    _fill(layer, norm)
    return layer


def import_into(
    found: list[ForeignNorm], library: Library, model: nn.Module, names: Names, inplace: bool
) -> tuple[nn.Module, Surgery]:
    """Return the model, or a copy, whose layers took those found, and the report.

    Raises
    ------
    InputError, InputTypeError, UnsupportedError
        The model cannot be operated on, the names do not fit, or a layer cannot take the arrays. Nothing is changed.
    """
    function = f"from_{library.name.lower()}"
    check_model(model, function)
    targets = batch_norms(model, function)
    pairs = _paired({norm.name: norm for norm in found}, targets, library, names)
    changes = {path: _conversion(path, targets[path], norm, library) for path, norm in pairs.items()}
    done = [
        Replacement(
            path, kind_of(targets[path]), f"{_described(targets[path], changes[path])} of {norm.name or library.name}"
        )
        for path, norm in pairs.items()
    ]
    notes = [
        f"{layer_name(path)} has a {name} that {library.name}'s layer lacks; it is constant."
        for path, norm in pairs.items()
        for name in PARAMETERS
        if getattr(targets[path], name) is not None and name not in norm.values
    ]
    left = [
        Left(path, kind_of(layer), "names has no layer for it") for path, layer in targets.items() if path not in pairs
    ]
    model = model if inplace else copied(model, function)
    for path, norm in pairs.items():
        layer, change = model.get_submodule(path), changes[path]
        if change is not None:
            change.apply(layer)
        assert isinstance(layer, Layer)
        _fill(layer, norm)
    return model, Surgery(tuple(done), tuple(left), notes=(*notes, *([] if inplace else [COPIES])))


def _paired(
    found: dict[str, ForeignNorm], targets: Mapping[str, nn.Module], library: Library, names: Names
) -> dict[str, ForeignNorm]:
    """Return the layer there for each path here, in the order of the model."""
    if names == "order":
        order = call_order(found, library)
        if len(order) != len(targets):
            raise InputError(
                f"with names='order' both models must have as many layers; got {len(order)} in {library.name} and "
                f"{len(targets)} in the model"
            )
        return dict(zip(targets, (found[name] for name in order), strict=True))
    if names is None:
        names = {name: name.replace("/", ".") for name in found}
        if len(found) == len(targets) == 1:
            names = dict(zip(found, targets, strict=True))
        elif not targets.keys() >= {*names.values()}:
            raise InputError(
                "names must say which layer of the model takes which, since their paths differ; got "
                f"{_some(found)} in {library.name} and {_some(targets)} in the model. Give a mapping, or names='order'"
            )
    if not isinstance(names, Mapping):
        raise InputTypeError(f"names must be a mapping from {library.name}'s to the model's, or 'order'; got {names!r}")
    for name, path in names.items():
        if name not in found:
            raise InputError(f"names must name layers of {library.name}, such as {_some(found)}; got {name!r}")
        if path not in targets:
            raise InputError(f"names must name layers of the model, such as {_some(targets)}; got {path!r}")
    if len({*names.values()}) < len(names):
        raise InputError("names must name each layer of the model once; got one twice")
    wanted = {path: found[name] for name, path in names.items()}
    return {path: wanted[path] for path in targets if path in wanted}


def _some(names: Mapping[str, object]) -> str:
    first = [repr(name) for name in names][:3]
    return ", ".join(first) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _conversion(path: str, module: nn.Module, norm: ForeignNorm, library: Library) -> Conversion | None:
    """Return what makes a layer of ours, with the conventions of the other library; None if nothing has to change.

    Raises
    ------
    InputError
        The layer cannot take the arrays.
    """
    where = layer_name(path)
    if is_lazy(module):
        raise InputError(f"{where} is lazy and must have seen a batch, which sets its channels")
    if is_parametrized(module):
        raise InputError(
            f"{where} must have parameters to take arrays; got a parametrized one. Call "
            "torch.nn.utils.parametrize.remove_parametrizations first"
        )
    for name, values in norm.values.items():
        mine = getattr(module, name, None)
        if mine is None:
            raise InputError(f"{where} must have a {name}, which takes {library.names[name]}; got None")
        if mine.shape != values.shape:
            raise InputError(
                f"{where} must have as many channels as {norm.name or library.name}; got {mine.numel()} and "
                f"{values.numel()}"
            )
    decided = decide(module, {"unbiased": False, "eps": norm.eps, "momentum": norm.momentum})
    if isinstance(decided, str):
        if decided == ALREADY:
            return None
        raise InputError(f"{where} must become a layer of batchnorm's to take the arrays, but {decided}")
    return decided


def _described(layer: nn.Module, change: Conversion | None) -> str:
    return kind_of(layer) if change is None else change.described(layer)


def _fill(layer: Layer, norm: ForeignNorm) -> None:
    """Give a layer the arrays, numbers and mode; a parameter that is missing there becomes constant."""
    initial = {"weight": 1.0, "bias": 0.0}
    lacking: dict[str, Tensor] = {}
    for name in PARAMETERS:
        parameter = getattr(layer, name)
        if parameter is not None and name not in norm.values:
            lacking[name] = torch.full_like(parameter, initial[name])
            parameter.requires_grad = False
    layer.load_state_dict(norm.values | lacking, strict=False)
    layer.eps, layer.momentum = norm.eps, norm.momentum
    if norm.frozen:
        layer.freeze(affine=True)


def named_layers(
    model: nn.Module, names: Mapping[str, str] | None, function: str
) -> Iterator[tuple[str, str, nn.Module]]:
    """Yield the name there, the path and the layer."""
    layers = batch_norms(model, function)
    if names is None:
        names = {path.replace(".", "/"): path for path in layers}
    for name, path in names.items():
        if path not in layers:
            raise InputError(f"names must name layers of the model, such as {_some(layers)}; got {path!r}")
        yield name, path, layers[path]


def arrays_of(layer: nn.Module, library: Library, where: str) -> dict[str, Any]:
    """Return the arrays of a layer by the library's names."""
    values = {name: getattr(layer, name, None) for name in library.names}
    if values["running_mean"] is None or is_lazy(layer):
        raise InputError(f"{where} must have running statistics; got a layer that keeps none, or has seen no batch")
    return {library.names[name]: to_array(tensor) for name, tensor in values.items() if tensor is not None}
