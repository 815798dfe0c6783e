"""Batch normalization as a function of tensors."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from batchnorm import ops
from batchnorm.checks import check, check_count, check_numbers
from batchnorm.errors import InputError, InputTypeError
from batchnorm.kernels.records import Operands, Rule, Running

__all__ = ["Stats", "batch_norm", "lengths_to_mask", "normalize"]


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
    check_numbers(momentum, eps, activation)
    if training:
        check_count(x)
    elif running_mean is None or running_var is None:
        raise InputError("without training, running_mean and running_var must be given; got None")
    running = Running(running_mean, running_var, None, momentum)
    return ops.batch_norm(Operands(x, weight, bias, residual, mask), running, Rule(eps, activation, training))


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
    check_numbers(momentum, eps, activation)
    if training:
        check_count(x)
    used = Running(mean, var, None, momentum, update=False)
    rule = Rule(eps, activation, training)
    y, batch, _ = ops.normalize(Operands(x, weight, bias, residual, mask), used, rule)
    y = y.movedim(1, channel_dim)
    if not training:
        return y, stats
    assert batch is not None
    return y, Stats(*ops.running.updated(Running(mean, var, count, momentum), batch))


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
        Lengths of another shape or dtype, below 0 or above ``size``.
    InputTypeError
        Lengths that are no tensor.

    Examples
    --------
    >>> lengths_to_mask(torch.tensor([1, 3]))
    tensor([[ True, False, False],
            [ True,  True,  True]])
    """
    if not isinstance(lengths, Tensor):
        raise InputTypeError(f"lengths must be a tensor of whole numbers; got {type(lengths).__name__}")
    if lengths.dim() != 1 or lengths.is_floating_point() or lengths.dtype == torch.bool:
        raise InputError(f"lengths must be whole numbers of shape (N,); got {lengths.dtype} {tuple(lengths.shape)}")
    greatest = int(lengths.max()) if lengths.numel() else 0
    if lengths.numel() and int(lengths.min()) < 0:
        raise InputError(f"lengths must be from 0; got {int(lengths.min())}")
    if size is not None and greatest > size:
        raise InputError(f"lengths must be at most size={size}; got {greatest}")
    return torch.arange(greatest if size is None else size, device=lengths.device) < lengths.unsqueeze(1)
