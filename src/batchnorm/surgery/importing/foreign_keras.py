"""The batch normalization layers in a Keras layer, model, or mapping of arrays. Keras itself is not imported."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from batchnorm.errors import InputError, InputTypeError, UnsupportedError
from batchnorm.surgery.importing.foreign import ForeignNorm, Library, flattened, groups

__all__ = ["KERAS", "read_keras"]

KERAS = Library(
    "Keras",
    {"weight": "gamma", "bias": "beta", "running_mean": "moving_mean", "running_var": "moving_variance"},
    epsilon=1e-3,
    momentum=0.99,
)
STATISTICS = ("moving_mean", "moving_variance")


def read_keras(source: Any, epsilon: float | None, momentum: float | None) -> list[ForeignNorm]:
    """Return the batch normalization layers, in the order in which Keras lists their weights.

    Raises
    ------
    InputError, InputTypeError, UnsupportedError
        There is none, one has missing or wrong arrays, or it cannot be expressed in torch.
    """
    if isinstance(source, Mapping):
        found = _of_arrays(source, epsilon, momentum)
    elif hasattr(source, "weights"):
        found = _of_objects(source, epsilon, momentum)
    elif isinstance(source, Sequence) and not isinstance(source, str):
        found = [_of_weights(source, epsilon, momentum)]
    else:
        raise InputTypeError(
            "source must be a layer or a model of Keras, a mapping of arrays by name, or the list that "
            f"layer.get_weights() returns; got {type(source).__name__}"
        )
    if not found:
        raise InputError(
            f"source must have a batch normalization layer, with moving_mean and moving_variance; "
            f"{type(source).__name__} has none"
        )
    return found


def _numbers(epsilon: Any, momentum: Any) -> tuple[Any, Any]:
    return KERAS.epsilon if epsilon is None else epsilon, KERAS.momentum if momentum is None else momentum


def _of_arrays(source: Mapping[Any, Any], epsilon: float | None, momentum: float | None) -> list[ForeignNorm]:
    leaves = {path.removesuffix(":0"): value for path, value in flattened(source).items()}  # ":0" of TensorFlow
    return [
        ForeignNorm.of(KERAS, name, arrays, _numbers(epsilon, momentum))
        for name, arrays in groups(leaves).items()
        if any(statistic in arrays for statistic in STATISTICS)
    ]


def _of_weights(weights: Sequence[Any], epsilon: float | None, momentum: float | None) -> ForeignNorm:
    """Return the layer of ``get_weights()``, a list without names."""
    names = {4: tuple(KERAS.names.values()), 2: STATISTICS}.get(len(weights))
    if names is None:
        raise InputError(
            "a list of weights must be gamma, beta, moving_mean and moving_variance, or the last two alone; got "
            f"{len(weights)} arrays. Give a mapping with these names"
        )
    return ForeignNorm.of(KERAS, "", dict(zip(names, weights, strict=True)), _numbers(epsilon, momentum))


def _of_objects(source: Any, epsilon: float | None, momentum: float | None) -> list[ForeignNorm]:
    # Layers are listed in no useful order, their weights in that of the layers.
    order = {id(variable): position for position, variable in enumerate(source.weights)}
    layers = {id(layer): layer for layer in _layers(source) if _is_batch_norm(layer)}
    for layer in layers.values():
        if layer.moving_mean is None:
            raise InputError(f"{layer.name} must be built, which gives it its arrays; run the model on a batch first")
        if getattr(layer, "renorm", False):
            raise UnsupportedError(
                f"{layer.name} has renorm=True, whose numbers torch's layers lack; set that option of batchnorm's "
                "layer yourself, and give its arrays by name"
            )
    ordered = sorted(layers.values(), key=lambda layer: order.get(id(layer.moving_mean), len(order)))
    names = ["" if layer is source else str(getattr(layer, "path", layer.name)) for layer in ordered]
    outer = f"{source.name}/"
    if all(name.startswith(outer) for name in names):
        names = [name.removeprefix(outer) for name in names]
    return [
        ForeignNorm.of(
            KERAS,
            name,
            {theirs: getattr(layer, theirs, None) for theirs in KERAS.names.values()},
            (layer.epsilon if epsilon is None else epsilon, layer.momentum if momentum is None else momentum),
            frozen=not layer.trainable,
        )
        for name, layer in zip(names, ordered, strict=True)
    ]


def _layers(source: Any) -> list[Any]:
    """Return a layer and all layers inside it."""
    # Keras does not document this method, and only it finds the layers within custom ones.
    if hasattr(source, "_flatten_layers"):
        return list(source._flatten_layers())
    return [source, *(inner for layer in getattr(source, "layers", []) for inner in _layers(layer))]


def _is_batch_norm(layer: Any) -> bool:
    return all(hasattr(layer, name) for name in (*STATISTICS, "epsilon", "momentum"))
