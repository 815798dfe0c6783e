"""Freezing of layers: they use their running statistics, whatever mode the model around them is in."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from batchnorm.errors import InputError
from batchnorm.nn.layer import Layer, layers_for
from batchnorm.nn.patterns import as_patterns, matching
from batchnorm.torch_internals import TorchBatchNorm

__all__ = ["freeze", "unfreeze"]


def freeze(
    model: nn.Module, statistics: bool = True, affine: bool = False, *, layers: str | Iterable[str] | None = None
) -> nn.Module:
    """Freeze the batch normalization layers of a model, in place; False leaves statistics or affine as they are.

    Parameters
    ----------
    model : Module
        A model whose layers are ours, as those of ``batchnorm.convert(model)``: torch's do not keep such a state
        through ``train()``.
    statistics : bool
        Normalize with the running statistics in training too, and stop updating them. Resets and assignments leave
        them as they are, with one warning per layer; ``load_state_dict`` fills them.
    affine : bool
        Keep gamma and beta constant: they get no gradient, and optimizers and ``reset_parameters()`` leave them alone.
    layers : str or iterable of str, optional
        Glob patterns for the paths of the layers, as "layer1.*" for all below layer1; None chooses all layers. A layer
        with several names is chosen by any of them.

    Returns
    -------
    Module
        The model given.

    Raises
    ------
    InputError
        The model has no batch normalization layer, a pattern matches none, or a layer chosen is one of torch's or has
        no running statistics. Nothing is frozen.

    Examples
    --------
    >>> import batchnorm as bn, torch
    >>> layer = bn.freeze(bn.BatchNorm1d(2)).train()
    >>> layer(torch.tensor([[1.0, 2.0]])).round(decimals=3)
    tensor([[1., 2.]], grad_fn=<RoundBackward1>)
    """
    chosen = _layers(model, "freeze", layers)
    for path, layer in chosen.items():
        if statistics and layer.running_mean is None:
            raise InputError(
                f"{path or 'the layer'} must keep running statistics to freeze them; got track_running_stats=False. "
                "Freeze its gamma and beta alone with statistics=False, affine=True"
            )
    for layer in chosen.values():
        layer.freeze(statistics=statistics, affine=affine)
    return model


def unfreeze(
    model: nn.Module, statistics: bool = True, affine: bool = True, *, layers: str | Iterable[str] | None = None
) -> nn.Module:
    """Undo `freeze`, in place: batch statistics are used and running ones updated, gamma and beta get gradients.

    Parameters
    ----------
    model : Module
    statistics, affine : bool
        False leaves statistics or affine as they are.
    layers : str or iterable of str, optional
        Glob patterns for the paths of the layers, as in `freeze`; None chooses all layers.

    Returns
    -------
    Module
        The model given.

    Raises
    ------
    InputError
        The model has no batch normalization layer, a pattern matches none, or a layer chosen is one of torch's.
    """
    for layer in _layers(model, "unfreeze", layers).values():
        layer.unfreeze(statistics=statistics, affine=affine)
    return model


def _layers(model: nn.Module, function: str, patterns: str | Iterable[str] | None) -> dict[str, Layer]:
    torchs = "do not keep such a state"
    if patterns is None:
        return layers_for(model, function, torchs, statistics=False)
    named = model.named_modules(remove_duplicate=False)
    paths = {path: module for path, module in named if isinstance(module, TorchBatchNorm)}
    if not paths:
        return layers_for(model, function, torchs, statistics=False)  # raises the error for a model without any
    given = as_patterns(patterns, "layers")
    if not given:
        raise InputError(f"layers must be None or at least one glob pattern; got {patterns!r}")
    found = matching(given, paths, "layers", "batch normalization layer")
    chosen: dict[str, Layer] = {}
    for path in found:
        layer = paths[path]
        if not isinstance(layer, Layer):
            raise InputError(
                f"{function} needs batchnorm's layers, since torch's {torchs}; got {path or 'the model itself'}, a "
                f"{type(layer).__name__}. Call batchnorm.convert(model) first"
            )
        if layer not in chosen.values():
            chosen[path] = layer
    return chosen
