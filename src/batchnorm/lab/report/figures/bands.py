"""Curves with bands, and values per arm, as the figures of the claims draw and list them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from batchnorm.lab.comparison.measures import QuartileBand
from batchnorm.lab.report.figures.figure import Axis, Series, Value, shown
from batchnorm.lab.training.settings import ARMS, Arm

__all__ = ["band", "band_rows", "band_text", "in_order_of_arms", "is_known", "short_layer_name", "step_axis"]

T = TypeVar("T")


def is_known(value: Value) -> bool:
    """Return whether there is a number, infinities included."""
    return value is not None and not math.isnan(value)


def in_order_of_arms(values: Mapping[Arm, T]) -> dict[Arm, T]:
    """Return the values in the order of the arms."""
    return {arm: values[arm] for arm in ARMS if arm in values}


def band(arm: str, x: Sequence[float], values: QuartileBand, **options: Any) -> Series:
    """Return a median as a line in its band."""
    return Series(arm, x, values.median, values.low, values.high, **options)


def short_layer_name(layer: str) -> str:
    """Return a layer's name for a button.

    >>> short_layer_name("hidden layer 2"), short_layer_name("output layer")
    ('2', 'output')
    """
    return layer.removeprefix("hidden layer ").removesuffix(" layer")


def band_text(values: QuartileBand, i: int) -> str:
    """Return a median with the ends of its band, or a dash."""
    if not is_known(values.median[i]):
        return "-"
    return f"{shown(values.median[i])} [{shown(values.low[i])}, {shown(values.high[i])}]"


def band_rows(
    head: Sequence[str], x: Sequence[float], curves: Mapping[Arm, QuartileBand]
) -> list[list[str | float | None]]:
    """Return rows of data of the curves: the cells of ``head``, arm, x, median, low, high."""
    return [
        [*head, arm, at, values.median[i], values.low[i], values.high[i]]
        for arm, values in curves.items()
        for i, at in enumerate(x)
    ]


def step_axis(steps: Sequence[float]) -> Axis:
    """Return an axis of gradient steps: logarithmic, unless it has to show step 0."""
    return Axis("gradient steps", "log" if min(steps) > 0 else "linear", "steps")
