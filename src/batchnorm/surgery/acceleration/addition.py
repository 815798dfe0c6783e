"""The addition of a tensor to the output of a layer, done by the layer where the tensor fits."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from batchnorm.errors import UnsupportedError
from batchnorm.kernels.reference import ACTIVATIONS
from batchnorm.nn.layer import Layer

__all__ = ["add_normalized"]


def add_normalized(layer: Layer, x: Tensor, other: Tensor) -> Tensor:
    """Return ``activation(normalized x + other)``, in one call where other has the shape and dtype of x.

    Forwards that `accelerate` writes call this function, since no graph tells whether an addition broadcasts.
    """
    if not isinstance(layer, Layer):
        raise UnsupportedError(
            f"batchnorm.accelerate wrote a forward that needs a layer of batchnorm's; got {type(layer).__name__}. Call "
            "batchnorm.to_torch(model), which takes such a forward back, before other code replaces its layers"
        )
    # A symbol of torch.fx has no type of tensors: the layer records its call.
    if not isinstance(x, Tensor) or (
        isinstance(other, Tensor) and other.shape == x.shape and other.dtype == x.dtype and other.device == x.device
    ):
        y: Tensor = layer(x, other)
        return y
    z: Tensor = _without_activation(layer)(x) + other
    return z if layer.activation is None else ACTIVATIONS[layer.activation].function(z)


def _without_activation(layer: Layer) -> Layer:
    """Return a layer with the same parameters, buffers and contexts, which applies no activation."""
    plain = object.__new__(type(layer))
    state = replace(layer.step_state, plans={}, plans_without_updates={})  # which are for the activation
    vars(plain).update(vars(layer) | {"activation": None, "step_state": state})
    return plain
