"""Where the channels of an input are: in dimension 1, as in torch's layers, or in another one (``channel_dim``)."""

from __future__ import annotations

from typing import NamedTuple, NoReturn

import torch
from torch import Tensor

from batchnorm.checks import check
from batchnorm.errors import InputError

__all__ = ["Batch", "arrange", "dimension_of_channels", "refuse_channels", "restore"]


class Batch(NamedTuple):
    """The tensors of a call with the channels in dimension 1.

    Attributes
    ----------
    x, residual : Tensor, shape (N, C, *) or (N * L, C)
        Rows (N * L, C) where the input has the channels last and is contiguous, since that needs no copy.
    mask : Tensor or None
        The shape of x without the channels, each size equal or 1.
    samples : int
        N.
    shape : torch.Size
        The shape of the input, for messages.
    """

    x: Tensor
    residual: Tensor | None
    mask: Tensor | None
    samples: int
    shape: torch.Size


def arrange(x: Tensor, residual: Tensor | None, mask: Tensor | None, dim: int) -> Batch:
    """Arrange the tensors of a call whose channels are in dimension dim.

    Raises
    ------
    InputError
        The residual or the mask does not fit the input.
    """
    shape = x.shape
    if dim == 1:
        return Batch(x, residual, mask, shape[0], shape)
    if residual is not None:
        check(x, residual, None)
    samples = shape[1 if dim == 0 else 0]
    if dim == x.dim() - 1 and x.is_contiguous():
        features = shape[dim]
        rows = None if residual is None else residual.reshape(-1, features)
        if mask is not None:
            check(x.movedim(dim, 1), None, mask)
            mask = mask.expand(shape[:-1]).reshape(-1)
        return Batch(x.view(-1, features), rows, mask, samples, shape)
    residual = None if residual is None else residual.movedim(dim, 1)
    return Batch(x.movedim(dim, 1), residual, mask, samples, shape)


def restore(y: Tensor, batch: Batch, dim: int) -> Tensor:
    """Return y as the input was, with the channels in dimension dim."""
    if dim == 1:
        return y
    return y.movedim(1, dim) if y.dim() == len(batch.shape) else y.view(batch.shape)


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


def refuse_channels(x: Tensor, dim: int, channels: int, num_features: int, label: str) -> NoReturn:
    """Raise the error of an input with another number of channels, and say which ``channel_dim`` would fit.

    ``channels`` are those of the layer's tensors, which are fewer than its num_features where a tool has cut them.
    """
    shape = tuple(x.shape)
    needed = f"num_features={channels}" if channels == num_features else channels
    message = f"{label}input must have {needed} channels in dimension {dim}; got {shape[dim]}, in shape {shape}"
    elsewhere = [i for i, size in enumerate(shape) if size == channels and i not in (0, dim)]
    if elsewhere:
        axes = "(N, L, C)" if len(shape) == 3 and elsewhere == [2] else f"channels in dimension {elsewhere[-1]}"
        channel_dim = -1 if elsewhere[-1] == len(shape) - 1 else elsewhere[-1]
        message += f". For {axes}, build the layer with channel_dim={channel_dim}"
    raise InputError(message)
