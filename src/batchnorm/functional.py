"""Batch normalization as a function of tensors."""

from __future__ import annotations

import torch
from torch import Tensor

from batchnorm import ops
from batchnorm.errors import InputError
from batchnorm.kernels.reference import ACTIVATIONS

__all__ = ["batch_norm", "check_activation"]


def check_activation(activation: str | None) -> None:
    """Raise `InputError` unless the activation is None or a known name."""
    if activation is not None and activation not in ACTIVATIONS:
        raise InputError(f"activation must be None or one of {', '.join(ACTIVATIONS)}; got {activation!r}")


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
    if residual is not None and residual.shape != x.shape:
        raise InputError(f"residual must have the input's shape {tuple(x.shape)}; got {tuple(residual.shape)}")
    if mask is not None:
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
        A shape, dtype or activation that does not fit; one value a channel when training; no running
        statistics when not training.

    Examples
    --------
    >>> x = torch.tensor([[1.0, 10.0], [3.0, 30.0]])
    >>> batch_norm(x, None, None, training=True, eps=0.0)
    tensor([[-1., -1.],
            [ 1.,  1.]])
    """
    check(x, residual, mask, running_mean=running_mean, running_var=running_var, weight=weight, bias=bias)
    check_activation(activation)
    if training:
        check_count(x)
    elif running_mean is None or running_var is None:
        raise InputError("without training, running_mean and running_var must be given; got None")
    running = ops.Running(running_mean, running_var, None, momentum)
    return ops.batch_norm(x, weight, bias, residual, mask, running, eps, activation, training)
