"""The values that the cases of same_numbers.py yield, and the numbers that they are made from."""

from __future__ import annotations

import base64
import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = [
    "Value",
    "Values",
    "gradients",
    "normal",
    "numbers_in",
    "prefixed",
    "sorted_numbers",
]

Value = Tensor | NDArray[Any] | float | None
Values = Iterator[tuple[str, Value]]
"""The named values of a case; None stands for a missing gradient or a momentum that is not set."""

TIMES = ("seconds", "stacking")
"""Parts of the names of measured times in a run, which are left out."""

PACKED = "errors"
"""The name of the errors of test rows in a run, which are bytes in base64."""

INFINITIES = ("inf", "-inf")
"""The texts that stand for infinite numbers in JSON."""


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return normal random numbers that depend on shape and seed alone, rounded to the dtype."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def prefixed(prefix: str, values: Iterable[tuple[str, Value]]) -> Values:
    """Yield the values with a prefix to their names."""
    return ((f"{prefix}: {name}", value) for name, value in values)


def gradients(y: Tensor, inputs: dict[str, Tensor | None]) -> Values:
    """Yield an output and its gradients with respect to the inputs, for a random gradient of its own layout."""
    yield "y", y
    wanted = {name: value for name, value in inputs.items() if value is not None and value.requires_grad}
    if y.requires_grad and wanted:
        dy = torch.empty_like(y).copy_(normal(*y.shape, seed=400))
        found = torch.autograd.grad(y, list(wanted.values()), dy, allow_unused=True)
        yield from zip((f"gradient of {name}" for name in wanted), found, strict=True)


def numbers_in(value: Any) -> Iterator[float]:
    """Yield the numbers within dictionaries, lists and dataclasses, but no times and no booleans."""
    match value:
        case None | bool():
            return
        case str():
            yield from [float(value)] if value in INFINITIES else []
        case int() | float():
            yield float(value)
        case np.ndarray() | np.generic():
            yield from numbers_in(value.tolist())
        case Mapping():
            for key, item in value.items():
                yield from numbers_under(key, item)
        case Sequence():
            for item in value:
                yield from numbers_in(item)
        case _ if dataclasses.is_dataclass(value):
            for field in dataclasses.fields(value):
                yield from numbers_under(field.name, getattr(value, field.name))
        case _:
            raise TypeError(f"numbers must be in dictionaries, lists and dataclasses; got {type(value).__name__}")


def numbers_under(name: str, value: Any) -> Iterator[float]:
    """Yield the numbers within a named value, unless its name shows that it is private or a measured time."""
    if name == PACKED:
        yield from map(float, base64.b64decode(value))
    elif not name.startswith("_") and not any(time in name for time in TIMES):
        yield from numbers_in(value)


def sorted_numbers(value: Any) -> NDArray[np.float64]:
    """Return the numbers within the value in an order that does not depend on its keys."""
    return np.array(sorted(numbers_in(value), key=float.hex), dtype=np.float64)
