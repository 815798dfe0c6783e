"""Batch normalization as a function of tensors."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from batchnorm import ops
from batchnorm.checks import Activation, check, check_count, check_numbers
from batchnorm.errors import InputError, InputTypeError
from batchnorm.kernels.records import Operands, Rule, Running

__all__ = ["Stats", "batch_norm", "lengths_to_mask", "normalize"]


def batch_norm(
    input: Tensor,  # noqa: A002 (torch's name for it)
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    activation: Activation | None = None,
    residual: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """Normalize each channel of a batch, then scale, shift, add a residual and apply an activation.

    ``y = activation(weight * (input - mean) / sqrt(var + eps) + bias + residual)``, Ioffe & Szegedy (2015).

    Parameters
    ----------
    input : Tensor, shape (N, C, *)
        The batch, of any floating dtype.
    running_mean, running_var : Tensor or None, shape (C,)
        Running statistics. In training they are updated in place, with the unbiased variance; otherwise they normalize
        the batch.
    weight, bias : Tensor or None, shape (C,)
        gamma and beta; None stands for 1 and 0.
    training : bool
        Whether to normalize with the batch's own mean and biased variance.
    momentum : float
        Weight of the new value in the running statistics, as in torch.
    eps : float
        Added to the variance.
    activation : str or None
        "relu", "leaky_relu" (slope 0.01), "silu", "gelu", "tanh" or "sigmoid".
    residual : Tensor or None, shape (N, C, *)
        Added before the activation.
    mask : Tensor or None, shape (N, *), bool
        True where a value counts; each size is equal or 1. Elsewhere y and the gradients are 0.

    Returns
    -------
    Tensor
        y, of the input's shape and dtype.

    Raises
    ------
    InputError
        A shape, dtype or activation does not fit, momentum or eps is out of range, a training batch has a single value
        per channel, or running statistics are missing outside of training.
    InputTypeError
        The residual or the mask is no tensor.

    Examples
    --------
    >>> batch = torch.tensor([[1.0, 10.0], [3.0, 30.0]])
    >>> batch_norm(batch, None, None, training=True, eps=0.0)
    tensor([[-1., -1.],
            [ 1.,  1.]])
    """
    tensors = (input, running_mean, running_var, weight, bias, residual, mask)
    if ops.are_overridden(*tensors):
        given = (*tensors[:5], training, momentum, eps)
        options: dict[str, Any] = {"activation": activation, "residual": residual, "mask": mask}
        return ops.call_overridden(batch_norm, tensors, given, **options)  # type: ignore[no-any-return]
    check(input, residual, mask, running_mean=running_mean, running_var=running_var, weight=weight, bias=bias)
    check_numbers(momentum, eps, activation)
    if training:
        check_count(input)
    elif running_mean is None or running_var is None:
        raise InputError("running_mean and running_var must be given unless training=True; got None")
    running = Running(running_mean, running_var, None, momentum)
    return ops.batch_norm(Operands(input, weight, bias, residual, mask), running, Rule(eps, activation, training))


class Stats(NamedTuple):
    """Running statistics as values.

    Attributes
    ----------
    mean, var : Tensor, shape (C,)
    count : Tensor
        Number of batches that they come from, a scalar of a whole dtype.
    """

    mean: Tensor
    var: Tensor
    count: Tensor  # type: ignore[assignment]  # it replaces tuple.count


def normalize(
    input: Tensor,  # noqa: A002 (torch's name for it)
    stats: Stats,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    training: bool = True,
    momentum: float | None = 0.1,
    eps: float = 1e-5,
    activation: Activation | None = None,
    residual: Tensor | None = None,
    mask: Tensor | None = None,
    channel_dim: int = 1,
) -> tuple[Tensor, Stats]:
    """Normalize a batch and return updated running statistics; nothing is changed in place.

    The function is pure, so it works under torch.func's grad, jvp, vmap and functional_call, where a layer's buffers
    can't be updated. The returned statistics take no part in gradients.

    Parameters
    ----------
    input : Tensor, shape (N, C, *)
        The batch; ``channel_dim`` says where else its channels are.
    stats : Stats
        Mean and variance (C,), and count of batches.
    weight, bias : Tensor or None, shape (C,)
        gamma and beta; None stands for 1 and 0.
    training : bool
        Whether to normalize with the batch's own statistics and to update those given; otherwise those given normalize
        the batch and are returned unchanged.
    momentum : float or None
        Weight of the new value in the running statistics, as in torch; None is the cumulative mean.
    eps : float
        Added to the variance.
    activation, residual, mask
        See `batch_norm`.
    channel_dim : int
        The dimension of the channels.

    Returns
    -------
    tuple of Tensor and Stats
        y, of the input's shape and dtype, and the new statistics.

    Raises
    ------
    InputError
        See `batch_norm`; also where ``channel_dim`` is no dimension of the input.
    InputTypeError
        The residual or the mask is no tensor.

    Examples
    --------
    >>> stats = Stats(torch.zeros(1), torch.ones(1), torch.tensor(0))
    >>> y, stats = normalize(torch.tensor([[1.0], [3.0]]), stats, momentum=0.5, eps=0.0)
    >>> y.flatten(), stats.mean, stats.var, stats.count
    (tensor([-1.,  1.]), tensor([1.]), tensor([1.5000]), tensor(1))
    """
    tensors = (input, *stats, weight, bias, residual, mask)
    if ops.are_overridden(*tensors):
        options: dict[str, Any] = {"training": training, "momentum": momentum, "eps": eps, "activation": activation}
        y, *found = ops.call_overridden(_normalize, tensors, tensors, **options, channel_dim=channel_dim)
        return y, Stats(*map(ops.without_subclass, found))
    if not -input.dim() <= channel_dim < input.dim():
        raise InputError(f"channel_dim={channel_dim} must be a dimension of the input; got shape {tuple(input.shape)}")
    x = input.movedim(channel_dim, 1)
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


def _normalize(*tensors: Any, **options: Any) -> tuple[Tensor, ...]:
    """Do as `normalize`, with all tensors and results in a row, in which subclasses of Tensor can read them."""
    x, mean, var, count, weight, bias, residual, mask = tensors
    y, stats = normalize(x, Stats(mean, var, count), weight, bias, residual=residual, mask=mask, **options)
    return y, *stats


def lengths_to_mask(lengths: Tensor, size: int | None = None) -> Tensor:
    """Return the mask of sequences padded at their end: True for the first ``lengths[i]`` positions of row i.

    Parameters
    ----------
    lengths : Tensor, shape (N,), of a whole dtype
        Numbers from 0 to L.
    size : int or None
        L; None stands for the greatest length.

    Returns
    -------
    Tensor, shape (N, L), bool
        It fits an input (N, C, L), or (N, L, C) with ``channel_dim=-1``.

    Raises
    ------
    InputError
        The lengths have another shape or dtype, or one is below 0 or above ``size``.
    InputTypeError
        The lengths are no tensor.

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
        raise InputError(f"lengths must be at least 0; got {int(lengths.min())}")
    if size is not None and greatest > size:
        raise InputError(f"lengths must be at most size={size}; got {greatest}")
    return torch.arange(greatest if size is None else size, device=lengths.device) < lengths.unsqueeze(1)
