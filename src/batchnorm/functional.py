"""Batch normalization as a function of tensors."""

from __future__ import annotations

import math
import numbers
from typing import NamedTuple

import torch
from torch import Tensor

from batchnorm import ops
from batchnorm.errors import InputError
from batchnorm.kernels.reference import ACTIVATIONS

__all__ = [
    "Stats",
    "batch_norm",
    "check",
    "check_activation",
    "check_momentum",
    "is_real",
    "is_whole",
    "lengths_to_mask",
    "normalize",
]


def is_real(value: object) -> bool:
    """Whether the value is a number, of Python or NumPy, and not NaN."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool) and not math.isnan(value)


def is_whole(value: object) -> bool:
    """Whether the value is a whole number, of Python or NumPy."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def check_activation(activation: str | None) -> None:
    """Raise `InputError` unless the activation is None or a known name."""
    if activation is not None and not (isinstance(activation, str) and activation in ACTIVATIONS):
        raise InputError(f"activation must be None or one of {', '.join(ACTIVATIONS)}; got {activation!r}")


def check_momentum(momentum: float | None) -> None:
    """Raise `InputError` unless the momentum is None or a weight."""
    if momentum is not None and not (is_real(momentum) and 0 <= momentum <= 1):
        raise InputError(f"momentum must be None or from 0 to 1, the weight of the new value; got {momentum!r}")


def _check_numbers(momentum: float | None, eps: float, activation: str | None) -> None:
    check_momentum(momentum)
    if not is_real(eps) or not 0 <= eps < math.inf:
        raise InputError(f"eps must be finite and at least 0; got {eps!r}")
    check_activation(activation)


def check(x: Tensor, residual: Tensor | None, mask: Tensor | None, **per_channel: Tensor | None) -> None:
    """Raise `InputError` unless shapes and dtypes fit: x (N, C, *), residual as x, mask (N, *), the others (C,)."""
    if x.dim() < 2:
        raise InputError(f"input must have at least 2 dimensions, (N, C, *); got shape {tuple(x.shape)}")
    if not x.is_floating_point():
        raise InputError(f"input must be of a floating dtype; got {x.dtype}")
    for name, values in per_channel.items():
        if values is not None and values.shape != x.shape[1:2]:
            raise InputError(
                f"{name} must have one number for each of the input's {x.shape[1]} channels (dimension 1); "
                f"got {values.numel()} for input of shape {tuple(x.shape)}"
            )
    if residual is not None:
        if not isinstance(residual, Tensor):
            raise InputError(f"residual must be a tensor; got {type(residual).__name__}")
        if residual.shape != x.shape:
            raise InputError(f"residual must have the input's shape {tuple(x.shape)}; got {tuple(residual.shape)}")
    if mask is not None:
        if not isinstance(mask, Tensor):
            raise InputError(f"mask must be a tensor; got {type(mask).__name__}")
        whole = (x.shape[0], *x.shape[2:])
        fits = mask.dim() == len(whole) and all(size in (1, of) for size, of in zip(mask.shape, whole, strict=True))
        if mask.dtype != torch.bool or not fits:
            raise InputError(
                f"mask must be bool and of shape {whole}, each size equal or 1; got {mask.dtype} {tuple(mask.shape)}"
            )


def check_count(x: Tensor) -> None:
    """Raise `InputError` where each channel has a single value, which has no variance to divide by."""
    if x.numel() == x.shape[1] > 0:
        raise InputError(f"training needs more than 1 value per channel; got input of shape {tuple(x.shape)}")


def batch_norm(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    activation: str | None = None,
    residual: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """Normalise each channel of a batch, then scale, shift, add a residual and apply an activation.

    ``y = activation(weight * (x - mean) / sqrt(var + eps) + bias + residual)``, Ioffe & Szegedy (2015).

    Parameters
    ----------
    x : Tensor, shape (N, C, *)
        The batch, of any floating dtype.
    running_mean, running_var : Tensor or None, shape (C,)
        Updated in place when training, with the unbiased variance; used for normalisation otherwise.
    weight, bias : Tensor or None, shape (C,)
        gamma and beta; None stands for 1 and 0.
    training : bool
        Normalise with the batch's own mean and biased variance.
    momentum : float
        Weight of the new value in the running statistics, as in torch.
    eps : float
        Added to the variance.
    activation : str or None
        "relu", "leaky_relu" (slope 0.01), "silu", "gelu", "tanh" or "sigmoid".
    residual : Tensor or None, shape (N, C, *)
        Added before the activation.
    mask : Tensor or None, shape (N, *), bool
        True where a value counts; sizes may be 1. Elsewhere y and the gradients are 0.

    Returns
    -------
    Tensor
        y, of x's shape and dtype.

    Raises
    ------
    InputError
        A shape, dtype or activation that does not fit, a momentum or eps out of range; one value a channel when
        training; no running statistics when not training.

    Examples
    --------
    >>> x = torch.tensor([[1.0, 10.0], [3.0, 30.0]])
    >>> batch_norm(x, None, None, training=True, eps=0.0)
    tensor([[-1., -1.],
            [ 1.,  1.]])
    """
    check(x, residual, mask, running_mean=running_mean, running_var=running_var, weight=weight, bias=bias)
    _check_numbers(momentum, eps, activation)
    if training:
        check_count(x)
    elif running_mean is None or running_var is None:
        raise InputError("without training, running_mean and running_var must be given; got None")
    running = ops.Running(running_mean, running_var, None, momentum)
    return ops.batch_norm(x, weight, bias, residual, mask, running, ops.Rule(eps, activation, training))


class Stats(NamedTuple):
    """Running statistics as values: mean and variance (C,), and the number of batches they come from."""

    mean: Tensor
    var: Tensor
    count: Tensor  # type: ignore[assignment]  # in the place of tuple.count


def normalize(
    x: Tensor,
    stats: Stats,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    training: bool = True,
    momentum: float | None = 0.1,
    eps: float = 1e-5,
    activation: str | None = None,
    residual: Tensor | None = None,
    mask: Tensor | None = None,
    channel_dim: int = 1,
) -> tuple[Tensor, Stats]:
    """Batch normalization that changes nothing: running statistics go in and come back moved.

    For torch.func: works under grad, jvp, vmap and functional_call, where a layer's buffers can't be moved. The
    statistics returned take no part in gradients.

    Parameters
    ----------
    x : Tensor, shape (N, C, *)
        The batch; with ``channel_dim`` the channels may stand elsewhere.
    stats : Stats
        Mean and variance (C,), count of batches.
    weight, bias : Tensor or None, shape (C,)
        gamma and beta; None stands for 1 and 0.
    training : bool
        Normalise with the batch's own statistics and move those given; else those given are used and come back.
    momentum : float or None
        Weight of the new value, as in torch; None is the cumulative mean.
    eps : float
        Added to the variance.
    activation, residual, mask
        As for `batch_norm`.
    channel_dim : int
        The dimension of the channels.

    Returns
    -------
    tuple of Tensor and Stats
        y, of x's shape and dtype, and the new statistics.

    Raises
    ------
    InputError
        As for `batch_norm`.

    Examples
    --------
    >>> stats = Stats(torch.zeros(1), torch.ones(1), torch.tensor(0))
    >>> y, stats = normalize(torch.tensor([[1.0], [3.0]]), stats, momentum=0.5, eps=0.0)
    >>> y.flatten(), stats.mean, stats.var, stats.count
    (tensor([-1.,  1.]), tensor([1.]), tensor([1.5000]), tensor(1))
    """
    if not -x.dim() <= channel_dim < x.dim():
        raise InputError(f"channel_dim={channel_dim} must be a dimension of the input; got shape {tuple(x.shape)}")
    x = x.movedim(channel_dim, 1)
    residual = residual.movedim(channel_dim, 1) if isinstance(residual, Tensor) else residual
    mean, var, count = stats
    check(x, residual, mask, mean=mean, var=var, weight=weight, bias=bias)
    _check_numbers(momentum, eps, activation)
    if training:
        check_count(x)
    used = ops.Running(mean, var, None, momentum, moving=False)
    rule = ops.Rule(eps, activation, training)
    y, batch, _ = ops.normalise(x, weight, bias, residual, mask, used, rule)
    y = y.movedim(1, channel_dim)
    if not training:
        return y, stats
    assert batch is not None
    moved = ops.moved(ops.Running(mean, var, count, momentum), batch)
    return y, Stats(*moved)


def lengths_to_mask(lengths: Tensor, size: int | None = None) -> Tensor:
    """The mask (N, L) of sequences padded at their end: True for the first ``lengths[i]`` positions of row i.

    Parameters
    ----------
    lengths : Tensor, shape (N,), of a whole dtype
        From 0 to L.
    size : int or None
        L; None takes the greatest length.

    Returns
    -------
    Tensor, shape (N, L), bool
        For (N, C, L) input, or with ``channel_dim=-1`` for (N, L, C).

    Raises
    ------
    InputError
        Lengths that are no tensor, of another shape or dtype, below 0 or above ``size``.

    Examples
    --------
    >>> lengths_to_mask(torch.tensor([1, 3]))
    tensor([[ True, False, False],
            [ True,  True,  True]])
    """
    if not isinstance(lengths, Tensor):
        raise InputError(f"lengths must be a tensor of whole numbers; got {type(lengths).__name__}")
    if lengths.dim() != 1 or lengths.is_floating_point() or lengths.dtype == torch.bool:
        raise InputError(f"lengths must be whole numbers of shape (N,); got {lengths.dtype} {tuple(lengths.shape)}")
    greatest = int(lengths.max()) if lengths.numel() else 0
    if lengths.numel() and int(lengths.min()) < 0:
        raise InputError(f"lengths must be from 0; got {int(lengths.min())}")
    if size is not None and greatest > size:
        raise InputError(f"lengths must be at most size={size}; got {greatest}")
    return torch.arange(greatest if size is None else size, device=lengths.device) < lengths.unsqueeze(1)
