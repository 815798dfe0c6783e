"""Batch normalization layers that go on as in eval, whatever mode their model is in."""

from __future__ import annotations

from torch import nn

from batchnorm.errors import InputError
from batchnorm.nn.layer import Layer, layers_of, stock_layers_of

__all__ = ["freeze", "unfreeze"]


def freeze(model: nn.Module, statistics: bool = True, affine: bool = False) -> nn.Module:
    """Freeze the batch normalization layers of a model, in place; what is not asked for stays as it is.

    Parameters
    ----------
    model : Module
        Its layers must be ours: torch's keep no such state through ``train()``.
    statistics : bool
        Normalise with the running statistics in training too, and move them no more.
    affine : bool
        Keep gamma and beta: they take no gradient, and an optimizer leaves them alone.

    Returns
    -------
    Module
        The model given.

    Raises
    ------
    InputError
        The model has no batch normalization layer, or one of torch's, or one without running statistics.

    Examples
    --------
    >>> import batchnorm as bn, torch
    >>> layer = bn.freeze(bn.BatchNorm1d(2)).train()
    >>> layer(torch.tensor([[1.0, 2.0]])).round(decimals=3)
    tensor([[1., 2.]], grad_fn=<RoundBackward1>)
    """
    layers = _layers(model, "freeze")
    for path, layer in layers.items():
        if statistics and layer.running_mean is None:
            raise InputError(
                f"to freeze the statistics of {path or 'the layer'} there must be running ones; it was built with "
                "track_running_stats=False"
            )
    for layer in layers.values():
        layer.freeze(statistics=statistics, affine=affine)
    return model


def unfreeze(model: nn.Module, statistics: bool = True, affine: bool = True) -> nn.Module:
    """Undo `freeze`, in place: statistics are those of the batch again and move, gamma and beta take gradients.

    Returns
    -------
    Module
        The model given.

    Raises
    ------
    InputError
        The model has no batch normalization layer, or one of torch's.
    """
    for layer in _layers(model, "unfreeze").values():
        layer.unfreeze(statistics=statistics, affine=affine)
    return model


def _layers(model: nn.Module, what: str) -> dict[str, Layer]:
    layers = layers_of(model)
    stock = list(stock_layers_of(model))
    if stock:
        raise InputError(
            f"{what} needs batchnorm's layers: torch's keep no such state; got {len(stock)} of torch's, the first "
            f"{stock[0] or 'the model itself'}"
        )
    if not layers:
        raise InputError(f"{what} needs a model with batch normalization layers; {type(model).__name__} has none")
    return layers
