"""Batch normalization layers of Keras and Flax, and the way back: names and conventions are turned."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, overload

from torch import nn

from batchnorm.nn import BatchNorm
from batchnorm.surgery.importing.foreign import PARAMETERS, STATISTICS
from batchnorm.surgery.importing.foreign_flax import COLLECTIONS, FLAX, read_flax
from batchnorm.surgery.importing.foreign_keras import KERAS, read_keras
from batchnorm.surgery.importing.into_model import Names, arrays_of, import_into, named_layers, single_layer
from batchnorm.surgery.report import Surgery
from batchnorm.torch_internals import TorchBatchNorm

__all__ = ["from_flax", "from_keras", "to_flax", "to_keras"]


@overload
def from_keras(source: Any, *, epsilon: float | None = None, momentum: float | None = None) -> BatchNorm: ...
@overload
def from_keras(
    source: Any,
    model: nn.Module,
    names: Names = None,
    *,
    epsilon: float | None = None,
    momentum: float | None = None,
    inplace: bool = False,
) -> tuple[nn.Module, Surgery]: ...
def from_keras(
    source: Any,
    model: nn.Module | None = None,
    names: Names = None,
    *,
    epsilon: float | None = None,
    momentum: float | None = None,
    inplace: bool = False,
) -> BatchNorm | tuple[nn.Module, Surgery]:
    """Return a batch normalization layer of Keras as one of ours, or a model whose layers took those of a Keras model.

    The layers continue training as in Keras: with the biased running variance (``unbiased=False``), ``eps`` of 1e-3
    where Keras has its default, and ``momentum`` as the weight of the new value (0.01 for 0.99). Only batch
    normalization is read: the kernels of convolutions have another layout, and are yours to permute.

    Parameters
    ----------
    source : layer, model, mapping or list
        A layer or model of Keras; arrays by name, such as ``{"gamma": ..., "moving_mean": ...}``, also nested or with
        the path before the name ("block/bn/gamma"); or the list that ``get_weights()`` of a layer returns.
    model : Module, optional
        The model that takes the layers; without one, ``source`` must have a single layer, and a `BatchNorm` is
        returned. Layers of torch's become ours.
    names : mapping of str to str, or "order"
        For each layer in Keras, by its path there, the module path of the one that takes it. "order" pairs the first
        with the first, where both models list their layers in the same order. Not needed where paths are equal but
        for "/" and ".".
    epsilon, momentum : float, optional
        Of the layers, in Keras's convention (momentum weighs the old value). By default those of the layers given, and
        Keras's defaults 1e-3 and 0.99 for arrays.
    inplace : bool
        Change the model given, whose parameters stay the same objects, so that its optimizer goes on.

    Returns
    -------
    BatchNorm, or tuple of Module and Surgery
        The layer; with ``model`` the model, by default a deep copy, and a report of the layers that took arrays.

    Raises
    ------
    InputError
        An array is missing, has a wrong shape or dtype, or fits no layer. The model stays as it was.
    InputTypeError
        ``source`` is none of the above.
    UnsupportedError
        A layer has ``renorm=True``, or the model is wrapped, scripted or quantized.

    Examples
    --------
    >>> import batchnorm as bn, numpy as np
    >>> arrays = {"gamma": np.ones(2), "beta": np.zeros(2), "moving_mean": np.ones(2), "moving_variance": np.ones(2)}
    >>> bn.from_keras(arrays, momentum=0.9)
    BatchNorm(2, eps=0.001, momentum=0.1, affine=True, bias=True, track_running_stats=True, unbiased=False)
    """
    found = read_keras(source, epsilon, momentum)
    return single_layer(found) if model is None else import_into(found, KERAS, model, names, inplace)


@overload
def from_flax(source: Any, *, epsilon: float | None = None, momentum: float | None = None) -> BatchNorm: ...
@overload
def from_flax(
    source: Any,
    model: nn.Module,
    names: Names = None,
    *,
    epsilon: float | None = None,
    momentum: float | None = None,
    inplace: bool = False,
) -> tuple[nn.Module, Surgery]: ...
def from_flax(
    source: Any,
    model: nn.Module | None = None,
    names: Names = None,
    *,
    epsilon: float | None = None,
    momentum: float | None = None,
    inplace: bool = False,
) -> BatchNorm | tuple[nn.Module, Surgery]:
    """Return a batch normalization layer of Flax as one of ours, or a model whose layers took those of a Flax model.

    As `from_keras`, with Flax's names (scale, bias, mean, var) and defaults (epsilon 1e-5, momentum 0.99).

    Parameters
    ----------
    source : mapping, nnx module or state
        The variables of linen, ``{"params": ..., "batch_stats": ...}``, or a TrainState that has both; an nnx module,
        or its state; or arrays by name, such as ``{"scale": ..., "mean": ...}``.
    model : Module, optional
    names : mapping of str to str, or "order"
        As for `from_keras`; paths there are joined with "/", as in "ResNetBlock_0/BatchNorm_1". Flax sorts the names
        in its states, so "order" is refused unless each level numbers its layers alike (BatchNorm_0, BatchNorm_1).
    epsilon, momentum : float, optional
        In Flax's convention (momentum weighs the old value). By default those of an nnx module, and else Flax's
        defaults 1e-5 and 0.99: a linen model has them in its code and not in its variables.
    inplace : bool

    Returns
    -------
    BatchNorm, or tuple of Module and Surgery

    Raises
    ------
    InputError, InputTypeError, UnsupportedError
        As for `from_keras`.

    Examples
    --------
    >>> import batchnorm as bn, numpy as np, torch
    >>> variables = {"params": {"norm": {"scale": np.ones(2), "bias": np.zeros(2)}},
    ...              "batch_stats": {"norm": {"mean": np.ones(2), "var": np.ones(2)}}}
    >>> model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    >>> model, report = bn.from_flax(variables, model, {"norm": "1"}, momentum=0.9)
    >>> model[1]
    BatchNorm1d(2, eps=1e-05, momentum=0.1, affine=True, bias=True, track_running_stats=True, unbiased=False)
    """
    found = read_flax(source, epsilon, momentum)
    return single_layer(found) if model is None else import_into(found, FLAX, model, names, inplace)


def to_keras(model: nn.Module, names: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Return the arrays of batch normalization layers, ours and torch's, by Keras's names.

    Build the layers there with ``epsilon=layer.eps`` and ``momentum=1 - layer.momentum``. The running variance is
    taken as it is; in training Keras goes on with the biased one, as layers with ``unbiased=False``.

    Parameters
    ----------
    model : Module
        A model or a layer.
    names : mapping of str to str, optional
        As for `from_keras`: for each layer in Keras the module path of the one here. By default all layers, by their
        module paths with "/".

    Returns
    -------
    dict
        Of a layer its gamma, beta, moving_mean and moving_variance (C,), those it has, in the order that
        ``set_weights`` takes; of a model such a dict for each name. NumPy lacks bfloat16, so it becomes float32.

    Raises
    ------
    InputError
        There is no such layer, or one has no running statistics.

    Examples
    --------
    >>> import batchnorm as bn
    >>> arrays = bn.to_keras(bn.BatchNorm1d(2))
    >>> list(arrays)
    ['gamma', 'beta', 'moving_mean', 'moving_variance']
    """
    if isinstance(model, TorchBatchNorm):
        return arrays_of(model, KERAS, "the layer")
    return {name: arrays_of(layer, KERAS, path) for name, path, layer in named_layers(model, names, "to_keras")}


def to_flax(model: nn.Module, names: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Return the arrays of batch normalization layers, ours and torch's, as variables of Flax.

    As `to_keras`. For nnx give ``nnx.update`` first the one collection and then the other.

    Parameters
    ----------
    model : Module
    names : mapping of str to str, optional

    Returns
    -------
    dict
        ``{"params": {...}, "batch_stats": {...}}``, each a tree of dicts along the parts of a name between "/", with
        scale and bias, or mean and var (C,), at its ends.

    Raises
    ------
    InputError
        There is no such layer, or one has no running statistics.

    Examples
    --------
    >>> import batchnorm as bn, torch
    >>> model = torch.nn.Sequential(torch.nn.Linear(3, 2), bn.BatchNorm1d(2))
    >>> bn.to_flax(model, {"block/norm": "1"})["batch_stats"]["block"]["norm"]["var"]
    array([1., 1.], dtype=float32)
    """
    variables: dict[str, Any] = {collection: {} for collection in COLLECTIONS}
    single = isinstance(model, TorchBatchNorm)
    found = [("", "the layer", model)] if single else [*named_layers(model, names, "to_flax")]
    for name, path, layer in found:
        arrays = arrays_of(layer, FLAX, path)
        for collection, kinds in zip(COLLECTIONS, (PARAMETERS, STATISTICS), strict=True):
            leaves = {FLAX.names[kind]: arrays[FLAX.names[kind]] for kind in kinds if FLAX.names[kind] in arrays}
            if leaves:
                tree = variables[collection]
                for part in name.split("/") if name else ():
                    tree = tree.setdefault(part, {})
                tree.update(leaves)
    return variables
