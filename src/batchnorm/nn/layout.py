"""Where the channels of an input are: in dimension 1, as in torch's layers, or in another one (``channel_dim``)."""

from __future__ import annotations

from typing import NoReturn

from torch import Tensor

from batchnorm.errors import InputError

__all__ = ["dimension_of_channels", "refuse_channels"]


def dimension_of_channels(x: Tensor, channel_dim: int) -> int:
    """Return the dimension of x that has the channels, counted from 0.

    Raises
    ------
    InputError
        x has no such dimension.
    """
    if not -x.dim() <= channel_dim < x.dim():
        raise InputError(f"channel_dim={channel_dim} must be a dimension of the input; got shape {tuple(x.shape)}")
    return channel_dim % x.dim()


def refuse_channels(x: Tensor, dim: int, num_features: int, label: str) -> NoReturn:
    """Raise the error of an input with another number of channels, and say which ``channel_dim`` would fit."""
    shape = tuple(x.shape)
    message = (
        f"{label}input must have num_features={num_features} channels in dimension {dim}; got {shape[dim]}, "
        f"in shape {shape}"
    )
    elsewhere = [i for i, size in enumerate(shape) if size == num_features and i not in (0, dim)]
    if elsewhere:
        axes = "(N, L, C)" if len(shape) == 3 and elsewhere == [2] else f"channels in dimension {elsewhere[-1]}"
        given = -1 if elsewhere[-1] == len(shape) - 1 else elsewhere[-1]
        message += f". For {axes}, build the layer with channel_dim={given}"
    raise InputError(message)
