"""Batch normalization layers of Keras and Flax as records: their arrays, and the numbers that stand in no array."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

import numpy as np
import torch
from torch import Tensor

from batchnorm.checks import is_real
from batchnorm.errors import InputError

__all__ = ["PARAMETERS", "STATISTICS", "ForeignNorm", "Library", "flattened", "number", "other_momentum", "to_array"]

PARAMETERS = ("weight", "bias")
STATISTICS = ("running_mean", "running_var")


@dataclass(frozen=True)
class Library:
    """The conventions of a library.

    Attributes
    ----------
    name : str
    names : dict of str to str
        For each of torch's four tensors its name there, in the order in which the library lists them.
    epsilon, momentum : float
        The defaults of its layer; momentum is the weight of the old value there.
    """

    name: str
    names: dict[str, str]
    epsilon: float
    momentum: float


@dataclass(frozen=True)
class ForeignNorm:
    """A batch normalization layer of another library, in torch's names and conventions.

    Attributes
    ----------
    name : str
        Its path there, with "/"; empty if it stands alone.
    values : dict of str to Tensor
        weight and bias (C,) where the layer has them, running_mean and running_var (C,).
    eps, momentum : float
        momentum is the weight of the new value, as in torch.
    frozen : bool
        Whether it normalizes with its running statistics in training too, and gets no gradients.
    """

    name: str
    values: dict[str, Tensor]
    eps: float
    momentum: float
    frozen: bool = False

    @classmethod
    def of(
        cls, library: Library, name: str, arrays: Mapping[str, Any], numbers: tuple[Any, Any], *, frozen: bool = False
    ) -> ForeignNorm:
        """Return the record of a layer with arrays by the library's names, and its epsilon and momentum.

        Raises
        ------
        InputError
            An array is missing or has another shape or dtype than it must, or a number is out of its range, among them
            the variances.
        """
        where = name or "the layer"
        found = {ours: arrays[theirs] for ours, theirs in library.names.items() if arrays.get(theirs) is not None}
        for ours in STATISTICS:
            if ours not in found:
                raise InputError(
                    f"{where} must have the arrays {library.names['running_mean']} and {library.names['running_var']}; "
                    f"got no {library.names[ours]} among {', '.join(map(str, arrays)) or 'none'}"
                )
        values = {ours: _tensor(value, f"{library.names[ours]} of {where}") for ours, value in found.items()}
        shape = tuple(values["running_mean"].shape)
        for ours, tensor in values.items():
            if tensor.dim() != 1 or tuple(tensor.shape) != shape:
                raise InputError(
                    f"each array of {where} must have one number per channel, and as many as the others; got "
                    f"{library.names[ours]} of shape {tuple(tensor.shape)} beside {library.names['running_mean']} of "
                    f"shape {shape}"
                )
        if not bool((values["running_var"] >= 0).all()):
            raise InputError(
                f"{library.names['running_var']} of {where} must have no negative number and no NaN; got "
                f"{float(values['running_var'].min()):.3g} as the smallest. The arrays may be in another order"
            )
        epsilon, momentum = numbers
        return cls(name, values, number(epsilon, "epsilon"), other_momentum(momentum), frozen)


def number(value: Any, parameter: str) -> float:
    """Return a number from 0 as a float of Python."""
    value = value.item() if isinstance(value, np.ndarray) and value.ndim == 0 else value
    if not (is_real(value) and 0 <= value < float("inf")):
        raise InputError(f"{parameter} must be a number from 0; got {value!r}")
    return float(value)


def other_momentum(momentum: Any) -> float:
    """Return the weight of the new value for that of the old, and the reverse, exact in decimal digits.

    >>> other_momentum(0.99), other_momentum(0.01)
    (0.01, 0.99)
    """
    if number(momentum, "momentum") > 1:
        raise InputError(f"momentum must be the weight of the old value, from 0 to 1; got {momentum!r}")
    return float(1 - Decimal(repr(float(momentum))))


def _tensor(value: Any, name: str) -> Tensor:
    """Return a copy of an array, a variable or a tensor, on the CPU."""
    if isinstance(value, Tensor):
        tensor = value.detach().to("cpu", copy=True)
    else:
        array = np.asarray(value)
        if array.dtype.name == "bfloat16":  # a dtype of the package ml_dtypes, which torch.from_numpy does not know
            tensor = torch.from_numpy(array.view(np.int16).copy()).view(torch.bfloat16)
        elif array.dtype.kind == "f" and array.dtype.itemsize in (2, 4, 8):
            tensor = torch.from_numpy(array.astype(array.dtype.newbyteorder("="), order="C", copy=True))
        else:
            raise InputError(f"{name} must be an array of floating numbers; got dtype {array.dtype}")
    if not tensor.is_floating_point():
        raise InputError(f"{name} must be an array of floating numbers; got dtype {tensor.dtype}")
    return tensor


def to_array(values: Tensor) -> np.ndarray[Any, Any]:
    """Return a copy as an array; float32 for bfloat16, which NumPy lacks."""
    values = values.detach().cpu()
    return (values.float() if values.dtype is torch.bfloat16 else values).numpy().copy()


def flattened(tree: Mapping[Any, Any]) -> dict[str, Any]:
    """Return the leaves of nested mappings and lists by their paths, joined with "/"; None is left out.

    >>> flattened({"block": {"norm": {"mean": 1, "bias": None}}, ("a", "b"): 2})
    {'block/norm/mean': 1, 'a/b': 2}
    """
    return dict(_leaves(tree.items(), ""))


def _leaves(items: Iterable[tuple[Any, Any]], prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in items:
        path = prefix + ("/".join(map(str, key)) if isinstance(key, tuple) else str(key))
        if isinstance(value, Mapping):
            yield from _leaves(value.items(), f"{path}/")
        elif isinstance(value, list | tuple) and not all(map(is_real, value)):
            yield from _leaves(enumerate(value), f"{path}/")
        elif value is not None:
            yield path, value


def groups(leaves: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the leaves by the path of their layer, and within it by their names.

    >>> groups({"a/b/gamma": 1, "a/b/beta": 2, "kernel": 3})
    {'a/b': {'gamma': 1, 'beta': 2}, '': {'kernel': 3}}
    """
    found: dict[str, dict[str, Any]] = {}
    for path, value in leaves.items():
        layer, _, name = path.rpartition("/")
        found.setdefault(layer, {})[name] = value
    return found


def call_order(names: Iterable[str], library: Library) -> list[str]:
    """Return names in the order of their calls, which Flax's states, sorted by name, show by numbers alone.

    Raises
    ------
    InputError
        The names of a level do not number it: "bn_init" beside "block_0" says nothing about the order.

    >>> call_order(["Block_10/BatchNorm_0", "Block_9/BatchNorm_1", "Block_9/BatchNorm_0"], Library("Flax", {}, 0, 0))
    ['Block_9/BatchNorm_0', 'Block_9/BatchNorm_1', 'Block_10/BatchNorm_0']
    """
    names = list(names)
    if library.name != "Flax":
        return names
    levels: dict[tuple[str, ...], set[str]] = {}
    for name in names:
        parts = name.split("/")
        for depth, part in enumerate(parts):
            levels.setdefault(tuple(parts[:depth]), set()).add(part)
    for level, found in levels.items():
        if len(found) > 1 and len({_stem(part) for part in found}) > 1:
            raise InputError(
                "with names='order' the names at each level must differ by a number alone, since Flax sorts them; got "
                f"{', '.join(sorted(found)[:3])} in {'/'.join(level) or 'the state'}. Give a mapping"
            )
    return sorted(names, key=lambda name: [_number(part) for part in name.split("/")])


def _stem(part: str) -> str:
    stem = part.rstrip("0123456789")
    return stem if stem != part else f"{part} has no number"


def _number(part: str) -> int:
    digits = part[len(part.rstrip("0123456789")) :]
    return int(digits) if digits else 0
