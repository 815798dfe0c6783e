"""Validation of numbers, options and shapes, shared by the functions and the layers.

Each ``check`` raises `InputError` where a value breaks a rule and `InputTypeError` where an argument is no tensor.
"""

from __future__ import annotations

import math
import numbers
from typing import Literal, get_args

import torch
from torch import Tensor

from batchnorm.errors import InputError, InputTypeError, warn

__all__ = [
    "ACTIVATION_NAMES",
    "Activation",
    "check",
    "check_activation",
    "check_count",
    "check_dense",
    "check_eps",
    "check_momentum",
    "check_numbers",
    "is_real",
    "is_whole",
]

Activation = Literal["relu", "leaky_relu", "silu", "gelu", "tanh", "sigmoid"]
ACTIVATION_NAMES: tuple[str, ...] = get_args(Activation)


def is_real(value: object) -> bool:
    """Return whether the value is a number of Python or NumPy other than NaN; True and False are none."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool) and not math.isnan(value)


def is_whole(value: object) -> bool:
    """Return whether the value is an integer of Python or NumPy; True and False are none."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def check_activation(activation: str | None) -> None:
    """Raise `InputError` unless the activation is None or one of `ACTIVATION_NAMES`."""
    if activation is not None and not (isinstance(activation, str) and activation in ACTIVATION_NAMES):
        raise InputError(f"activation must be None or one of {', '.join(ACTIVATION_NAMES)}; got {activation!r}")


def check_eps(eps: float) -> None:
    """Raise `InputError` unless eps is a finite number from 0."""
    if not is_real(eps) or not 0 <= eps < math.inf:
        raise InputError(f"eps must be finite and at least 0; got {eps!r}")


def check_momentum(momentum: float | None) -> None:
    """Raise `InputError` unless the momentum is None or a finite number from 0; torch takes those above 1 too."""
    if momentum is not None and not (is_real(momentum) and 0 <= momentum < math.inf):
        raise InputError(
            "momentum must be None or a number from 0 (the weight of the new value, at most 1 as a rule); "
            f"got {momentum!r}"
        )
    if momentum is not None and momentum > 1:
        warn(
            f"momentum={momentum} weighs the old running statistics by {1 - momentum:.4g}, so that they overshoot each "
            "batch and the running variance may become negative; it is the weight of the new value, from 0 to 1"
        )


def check_numbers(momentum: float | None, eps: float, activation: str | None) -> None:
    """Raise `InputError` unless momentum, eps and activation are in their ranges."""
    check_momentum(momentum)
    check_eps(eps)
    check_activation(activation)


def check_dense(x: Tensor) -> None:
    """Raise `InputError` for a nested or sparse tensor, or another that does not keep all its values by strides."""
    if x.is_nested:
        raise InputError(
            "input must be a dense tensor; got a nested one. Pad it with torch.nested.to_padded_tensor, and give the "
            "layer a mask, such as that of batchnorm.lengths_to_mask"
        )
    if x.layout is not torch.strided:
        raise InputError(f"input must be a dense tensor; got one of layout {x.layout}. Give input.to_dense()")


def check(x: Tensor, residual: Tensor | None, mask: Tensor | None, **per_channel: Tensor | None) -> None:
    """Raise an error unless shapes and dtypes fit: x and residual (N, C, *), mask (N, *), all others (C,).

    Raises
    ------
    InputError
        A shape or dtype does not fit.
    InputTypeError
        The residual or the mask is no tensor.
    """
    check_dense(x)
    if x.dim() < 2:
        raise InputError(f"input must have at least 2 dimensions, (N, C, *); got shape {tuple(x.shape)}")
    if not x.is_floating_point():
        way_out = "; quantize the model that batchnorm.to_torch(model) returns" if x.is_quantized else ""
        raise InputError(f"input must have a floating dtype; got {x.dtype}{way_out}")
    for name, values in per_channel.items():
        if values is not None and values.shape != x.shape[1:2]:
            raise InputError(
                f"{name} must have one number for each of the input's {x.shape[1]} channels (dimension 1); "
                f"got {values.numel()} for input of shape {tuple(x.shape)}"
            )
    if residual is not None:
        if not isinstance(residual, Tensor):
            raise InputTypeError(f"residual must be a tensor; got {type(residual).__name__}")
        if residual.shape != x.shape:
            raise InputError(f"residual must have the input's shape {tuple(x.shape)}; got {tuple(residual.shape)}")
    if mask is not None:
        if not isinstance(mask, Tensor):
            raise InputTypeError(f"mask must be a tensor; got {type(mask).__name__}")
        without_channels = (x.shape[0], *x.shape[2:])
        fits = mask.dim() == len(without_channels) and all(
            size in (1, whole) for size, whole in zip(mask.shape, without_channels, strict=True)
        )
        if mask.dtype != torch.bool or not fits:
            raise InputError(
                f"mask must be bool and of shape {without_channels}, where each size may also be 1; "
                f"got {mask.dtype} {tuple(mask.shape)}"
            )


def check_count(x: Tensor) -> None:
    """Raise `InputError` if each channel has a single value, whose variance is 0."""
    if x.numel() == x.shape[1] > 0:
        raise InputError(f"training needs more than 1 value per channel; got input of shape {tuple(x.shape)}")
