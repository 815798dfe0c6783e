"""Curves that are kept as a median in a band, as the figures of the claims draw and list them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from batchnorm.lab.report.figures.figure import LABELS, Axis, Series, Value, shown

__all__ = ["Band", "band", "band_rows", "of_arms", "short", "spread_text", "step_axis"]

Band = Mapping[str, Sequence[Value]]


def of_arms(values: Mapping[str, Any]) -> dict[str, Any]:
    """What is kept for arms, in their order; the rest is left."""
    return {arm: values[arm] for arm in LABELS if arm in values}


def band(arm: str, x: Sequence[float], values: Band, **options: Any) -> Series:
    """A median as a line in its band."""
    return Series(arm, x, values["median"], values["low"], values["high"], **options)


def short(layer: str) -> str:
    """A layer's name for a button.

    >>> short("hidden layer 2"), short("output layer")
    ('2', 'output')
    """
    return layer.removeprefix("hidden layer ").removesuffix(" layer")


def spread_text(values: Mapping[str, Sequence[Value]], i: int) -> str:
    """A median with the ends of its band."""
    if values["median"][i] is None:
        return "-"
    return f"{shown(values['median'][i])} [{shown(values['low'][i])}, {shown(values['high'][i])}]"


def band_rows(head: Sequence[str], x: Sequence[float], curves: Mapping[str, Band]) -> list[list[str | float | None]]:
    """Rows of data of curves: what they are of, group, x, median, low, high."""
    return [
        [*head, arm, at, values["median"][i], values["low"][i], values["high"][i]]
        for arm, values in curves.items()
        for i, at in enumerate(x)
    ]


def step_axis(steps: Sequence[float]) -> Axis:
    """An axis of gradient steps: logarithmic, unless it has to show step 0."""
    return Axis("gradient steps", "log" if min(steps) > 0 else "linear", "steps")
