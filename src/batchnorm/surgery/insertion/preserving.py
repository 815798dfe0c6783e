"""The parameters and statistics with which a new layer leaves the function of a network as it is."""

from __future__ import annotations

import torch
from torch import Tensor

from batchnorm.errors import InputError
from batchnorm.nn.layer import Layer
from batchnorm.statistics.changes import layer_name
from batchnorm.statistics.layers import variance_to_keep
from batchnorm.statistics.moments import Moments

__all__ = ["undo_normalization"]


@torch.no_grad()
def undo_normalization(layer: Layer, moments: Moments, bias: Tensor | None, path: str) -> None:
    """Give a layer the moments as running statistics, with the gamma and beta that undo the normalization.

    Gamma and beta are rounded to their dtype first, and the statistics, which may be wider, follow from them.

    Parameters
    ----------
    layer : Layer
    moments : Moments
        Of the input, with the bias of the layer before it.
    bias : Tensor or None
        It is dropped.
    path : str
        Of the layer before it, for messages.
    """
    if not bool(moments.mean.isfinite().all() and moments.m2.isfinite().all()):
        raise InputError(f"the output of {layer_name(path)} must be finite on the example; got infinite or NaN values")
    if moments.count < 2:
        raise InputError(f"{layer_name(path)} must give at least 2 values per channel on the example; got 1")
    gamma, beta, running_mean, running_var = layer.weight, layer.bias, layer.running_mean, layer.running_var
    assert gamma is not None
    assert beta is not None
    assert running_mean is not None
    assert running_var is not None
    eps = layer.epsilon()
    mean, var = moments.mean, variance_to_keep(layer, moments)
    if eps == 0 and not bool((var > 0).all()):
        raise InputError(f"eps must be positive, since a channel of {layer_name(path)} is constant; got eps=0")
    gamma.copy_((var + eps).sqrt())
    beta.copy_(mean)
    running_var.copy_((gamma.double().square() - eps).clamp(min=0))
    running_mean.copy_(beta.double() - (0 if bias is None else bias.double()))
