"""Where a plot puts what took more than the steps trained: in a zone of its own, not at a number."""

from __future__ import annotations

import math
from collections.abc import Sequence

from batchnorm.lab.report.figures.figure import Axis, Mark, Rule, Series, Value

__all__ = ["place", "placed", "steps_axis", "zone_rule"]

LANES: dict[str, float] = {"none": 1.3, "before": 1.6, "after": 2.0}
END = 2.5
MOST_TICKS = 5


def place(arm: str, count: Value, steps: int) -> tuple[float, Mark]:
    """Where a count of steps is drawn and how: at itself, or in the arm's own lane of the zone beyond."""
    return (count, "known") if count is not None else (steps * LANES[arm], "beyond")


def placed(arm: str, x: Sequence[float], counts: Sequence[Value], steps: int, said: Sequence[str]) -> list[Series]:
    """Counts of steps over x: a mark for each, and a line through those that are known."""
    places = [place(arm, count, steps) for count in counts]
    marks = Series(arm, x, [y for y, _ in places], line=False, marks=[mark for _, mark in places], text=said)
    return [Series(arm, x, counts), marks]


def steps_axis(title: str, counts: Sequence[Value], steps: int) -> Axis:
    """A logarithmic axis of steps that ends in the zone "> S"."""
    least = min([count for count in counts if count is not None], default=steps / 10)
    start = min(least, steps / 4) / 1.4
    round_numbers = [digit * 10.0**i for i in range(math.ceil(math.log10(steps))) for digit in (1, 2, 5)]
    ticks = [(value, f"{value:g}") for value in round_numbers if start <= value <= steps / 1.7]
    if len(ticks) > MOST_TICKS:
        ticks = [tick for tick in ticks if math.log10(tick[0]).is_integer()]
    return Axis(title, "log", ticks=[*ticks, (steps * LANES["before"], f"> {steps}")], range=(start, steps * END))


def zone_rule(axis: str, steps: int) -> Rule:
    """The line at which the zone begins."""
    return Rule("x" if axis == "x" else "y", steps, "", beyond=True)
