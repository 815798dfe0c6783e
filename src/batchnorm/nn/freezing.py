"""Freezing of layers: they use their running statistics, whatever mode the model around them is in."""

from __future__ import annotations

from torch import nn

from batchnorm.errors import InputError
from batchnorm.nn.layer import Layer, layers_for

__all__ = ["freeze", "unfreeze"]


def freeze(model: nn.Module, statistics: bool = True, affine: bool = False) -> nn.Module:
    """Freeze the batch normalization layers of a model, in place; False leaves statistics or affine as they are.

    Parameters
    ----------
    model : Module
        A model whose layers are ours: torch's do not keep such a state through ``train()``.
    statistics : bool
        Normalize with the running statistics in training too, and stop updating them. Resets and assignments leave
        them as they are, with one warning per layer; ``load_state_dict`` fills them.
    affine : bool
        Keep gamma and beta constant: they get no gradient, and optimizers and ``reset_parameters()`` leave them alone.

    Returns
    -------
    Module
        The model given.

    Raises
    ------
    InputError
        The model has no batch normalization layer, has one of torch's, or has one without running statistics.

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
                f"{path or 'the layer'} must keep running statistics to freeze them; got track_running_stats=False. "
                "Freeze its gamma and beta alone with statistics=False, affine=True"
            )
    for layer in layers.values():
        layer.freeze(statistics=statistics, affine=affine)
    return model


def unfreeze(model: nn.Module, statistics: bool = True, affine: bool = True) -> nn.Module:
    """Undo `freeze`, in place: batch statistics are used and running ones updated, gamma and beta get gradients.

    Returns
    -------
    Module
        The model given.

    Raises
    ------
    InputError
        The model has no batch normalization layer, or has one of torch's.
    """
    for layer in _layers(model, "unfreeze").values():
        layer.unfreeze(statistics=statistics, affine=affine)
    return model


def _layers(model: nn.Module, function: str) -> dict[str, Layer]:
    return layers_for(model, function, "do not keep such a state", statistics=False)
