"""The batch normalization layers in a state of Flax, linen or nnx. Neither Flax nor JAX is imported."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from batchnorm.errors import InputError, InputTypeError
from batchnorm.surgery.importing.foreign import ForeignNorm, Library, flattened, groups

__all__ = ["COLLECTIONS", "FLAX", "read_flax"]

FLAX = Library(
    "Flax",
    {"weight": "scale", "bias": "bias", "running_mean": "mean", "running_var": "var"},
    epsilon=1e-5,
    momentum=0.99,
)
STATISTICS = ("mean", "var")
COLLECTIONS = ("params", "batch_stats")


def read_flax(source: Any, epsilon: float | None, momentum: float | None) -> list[ForeignNorm]:
    """Return the batch normalization layers, in the order of the state.

    Raises
    ------
    InputError, InputTypeError
        There is none, or one has missing or wrong arrays.
    """
    if not isinstance(source, Mapping) and all(hasattr(source, name) for name in COLLECTIONS):  # a TrainState
        source = {name: getattr(source, name) for name in COLLECTIONS}
    if isinstance(source, Mapping):
        found = _of_arrays(source, epsilon, momentum)
    elif _is_nnx(source):
        found = _of_objects(source, epsilon, momentum)
    else:
        raise InputTypeError(
            "source must be the variables of a linen model with params and batch_stats, an nnx module or its state, or "
            f"a mapping of arrays by name; got {type(source).__name__}"
        )
    if not found:
        raise InputError(
            "source must have a batch normalization layer, with mean and var (linen keeps them in batch_stats); "
            f"{type(source).__name__} has none"
        )
    return found


def _numbers(epsilon: Any, momentum: Any) -> tuple[Any, Any]:
    return FLAX.epsilon if epsilon is None else epsilon, FLAX.momentum if momentum is None else momentum


def _of_arrays(source: Mapping[Any, Any], epsilon: float | None, momentum: float | None) -> list[ForeignNorm]:
    leaves = {}
    for path, value in flattened(source).items():
        collection, _, rest = path.partition("/")
        leaves[rest if collection in COLLECTIONS else path] = value
    return [
        ForeignNorm.of(FLAX, name, arrays, _numbers(epsilon, momentum))
        for name, arrays in groups(leaves).items()
        if sum(key in arrays for key in FLAX.names.values()) > 1 and any(key in arrays for key in STATISTICS)
    ]


def _of_objects(source: Any, epsilon: float | None, momentum: float | None) -> list[ForeignNorm]:
    return [
        ForeignNorm.of(
            FLAX,
            name,
            {theirs: getattr(layer, theirs, None) for theirs in FLAX.names.values()},
            (layer.epsilon if epsilon is None else epsilon, layer.momentum if momentum is None else momentum),
        )
        for name, layer in _norms(source, "", set())
    ]


def _is_nnx(value: Any) -> bool:
    return any(kind.__module__.startswith("flax.nnx") for kind in type(value).__mro__)


def _norms(value: Any, path: str, seen: set[int]) -> Iterator[tuple[str, Any]]:
    """Yield the batch normalization layers of an nnx module by path, each once, in the order of the attributes."""
    if id(value) in seen:
        return
    seen.add(id(value))
    if all(hasattr(value, name) for name in (*STATISTICS, "epsilon", "momentum", "num_features")):
        yield path, value
        return
    children: Iterator[tuple[Any, Any]] = iter(())
    if isinstance(value, Mapping):
        children = iter(value.items())
    elif isinstance(value, list | tuple):
        children = iter(enumerate(value))
    elif _is_nnx(value) and hasattr(value, "__dict__"):
        children = iter(vars(value).items())
    for name, child in children:
        yield from _norms(child, f"{path}{path and '/'}{name}", seen)
