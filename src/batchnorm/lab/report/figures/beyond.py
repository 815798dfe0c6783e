"""Positions of counts that exceed the steps trained: in a zone of their own, because their numbers are unknown."""

from __future__ import annotations

import math
from collections.abc import Sequence

from batchnorm.lab.report.figures.figure import Axis, Mark, ReferenceLine, Series, Value

__all__ = ["position", "steps_axis", "steps_series", "zone_line"]

LANES: dict[str, float] = {"none": 1.3, "before": 1.6, "after": 2.0}
END = 2.5
MOST_TICKS = 5


def position(arm: str, count: Value, steps: int) -> tuple[float, Mark]:
    """Return the position and mark of a count of steps: its value, or the arm's own lane of the zone beyond."""
    return (count, "known") if count is not None else (steps * LANES[arm], "beyond")


def steps_series(
    arm: str, x: Sequence[float], counts: Sequence[Value], steps: int, texts: Sequence[str]
) -> list[Series]:
    """Return counts of steps over x as a mark each, and a line through the known ones."""
    positions = [position(arm, count, steps) for count in counts]
    marks = Series(arm, x, [y for y, _ in positions], line=False, marks=[mark for _, mark in positions], text=texts)
    return [Series(arm, x, counts), marks]


def steps_axis(title: str, counts: Sequence[Value], steps: int) -> Axis:
    """Return a logarithmic axis of steps that ends in the zone "> steps"."""
    least = min([count for count in counts if count is not None], default=steps / 10)
    start = min(least, steps / 4) / 1.4
    round_numbers = [digit * 10.0**i for i in range(math.ceil(math.log10(steps))) for digit in (1, 2, 5)]
    ticks = [(value, f"{value:g}") for value in round_numbers if start <= value <= steps / 1.7]
    if len(ticks) > MOST_TICKS:
        ticks = [tick for tick in ticks if math.log10(tick[0]).is_integer()]
    return Axis(title, "log", ticks=[*ticks, (steps * LANES["before"], f"> {steps}")], range=(start, steps * END))


def zone_line(axis: str, steps: int) -> ReferenceLine:
    """Return the line at which the zone beyond the steps trained begins."""
    return ReferenceLine("x" if axis == "x" else "y", steps, "", beyond=True)
