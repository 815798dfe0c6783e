"""The result in words: one sentence of verdict, and one caveat."""

from __future__ import annotations

import math

from batchnorm.lab.comparison.measures import CONFIDENCE, Bounds, PairSummary
from batchnorm.lab.comparison.result import MedianRatio, Ratio, Result
from batchnorm.lab.comparison.scores import Difference
from batchnorm.lab.training.settings import Arm

__all__ = ["bounds_text", "caveat", "difference_text", "factor_text", "number", "ratio_text", "steps_text", "verdict"]

WHERE: dict[str, str] = {"before": "before the nonlinearity", "after": "after it"}


def number(value: float) -> str:
    """Return a number with two significant digits, or as a whole number from 10 on: 0.012, 5.6, 17, 120."""
    return f"{value:.2g}" if abs(value) < 10 else f"{value:.0f}"


def bounds_text(bounds: Bounds) -> str:
    """Return a known number, or its bounds in words."""
    lower, upper = bounds
    if lower == upper:
        return number(lower)
    if upper == math.inf:
        return f"at least {number(lower)}" if lower > 0 else "unknown"
    return f"{number(lower)} to {number(upper)}" if lower > 0 else f"at most {number(upper)}"


def factor_text(bounds: Bounds) -> str:
    """Return a ratio or its bounds as a factor, such as "5.6x" or "10 to 19x".

    >>> factor_text((10.0, 19.2)), factor_text((3.0, math.inf)), factor_text((0.0, math.inf))
    ('10 to 19x', 'at least 3x', 'unknown')
    """
    text = bounds_text(bounds)
    return text if text == "unknown" else f"{text}x"


def ratio_text(ratio: MedianRatio | PairSummary) -> str:
    """Return the median ratio with its interval, such as "5.6 [4.1, 9]"."""
    low, high = ratio.interval
    top = "inf" if high == math.inf else number(high)
    median = bounds_text(ratio.median).replace("at least ", ">=").replace("at most ", "<=")
    return f"{median} [{number(low)}, {top}]"


def difference_text(difference: Difference) -> str:
    """Return a difference of test scores with its interval, such as "+0.016 [+0.002, +0.031]"."""
    low, high = difference.interval
    return f"{difference.estimate:+.3f} [{low:+.3f}, {high:+.3f}]"


def steps_text(median: float | None, steps: int) -> str:
    """Return the median steps, or that they are above the steps trained."""
    return f"> {steps}" if median is None else f"{median:.0f}"


def _direction(ratio: Ratio) -> int:
    """Return 1 or -1 where the whole interval says fewer or more steps, and 0 where it does neither."""
    low, high = ratio.interval
    return 0 if ratio.confidence < CONFIDENCE else int(low > 1) - int(high < 1)


def _inverse(bounds: Bounds) -> Bounds:
    return 1 / bounds[1], 1 / bounds[0] if bounds[0] > 0 else math.inf


def _end(value: float) -> str:
    return "unbounded" if value == math.inf else number(value)


def _interval(ratio: Ratio, bounds: Bounds) -> str:
    """Return an interval with its confidence, such as "97.9% CI 4.1 to 9"."""
    return f"{100 * ratio.confidence:.3g}% CI {_end(bounds[0])} to {_end(bounds[1])}"


def _clear(arm: Arm, ratio: Ratio) -> str:
    """Return a clear effect, such as "5.6x fewer steps before the nonlinearity (97.9% CI 4.1 to 9)"."""
    fewer = _direction(ratio) > 0
    median, interval = ratio.median, ratio.interval
    if not fewer:
        median, interval = _inverse(median), _inverse(interval)
    return f"{factor_text(median)} {'fewer' if fewer else 'more'} steps {WHERE[arm]} ({_interval(ratio, interval)})"


def _unclear(arm: Arm, ratio: Ratio) -> str:
    """Return an unclear effect, such as "before the nonlinearity (ratio of steps 1.1, 97.9% CI 0.6 to 2)"."""
    return f"{WHERE[arm]} (ratio of steps {bounds_text(ratio.median)}, {_interval(ratio, ratio.interval)})"


def verdict(result: Result, name: str, steps: int) -> str:
    """Return one sentence: what batch normalization changed on this data, or that it does not help."""
    ratios, arms = result.ratios, result.arms
    rule = result.target.rule.split(",")[0]
    if not math.isfinite(result.target.value):
        trains = [WHERE[arm] for arm in ratios if arms[arm].diverged < len(arms[arm].steps)]
        with_it = f"and with it {' and '.join(trains)} trained" if trains else "and so did those with it"
        return (
            f"On {name} the network without batch norm diverged at every learning rate tried, {with_it}; "
            "so there is no target to count steps to."
        )
    if all(values.median_steps is None for values in arms.values()):
        return f"On {name} no arm had most of its runs reach {rule} within {steps} steps, so no ratio can be given."
    if not result.headline:
        medians = {arm: steps_text(values.median_steps, steps) for arm, values in arms.items()}
        return (
            f"On {name}, too small for a ratio, the median steps to {rule} were {medians['none']} without batch "
            f"norm, {medians['before']} with it before the nonlinearity and {medians['after']} after it."
        )
    directions = {arm: _direction(ratio) for arm, ratio in ratios.items()}
    clear = " and ".join(_clear(arm, ratio) for arm, ratio in ratios.items() if directions[arm])
    unclear = [_unclear(arm, ratio) for arm, ratio in ratios.items() if not directions[arm]]
    rest = f"; the effect {unclear[0]} is not clear" if unclear else ""
    if max(directions.values()) > 0:
        return f"On {name} batch norm needs {clear} to reach {rule}{rest}."
    if min(directions.values()) < 0:
        return f"On {name} batch norm does not help the network reach {rule} sooner; it needs {clear}{rest}."
    return f"On {name} batch norm does not clearly help the network reach {rule} sooner, either {' or '.join(unclear)}."


def caveat(result: Result, validation_rows: int) -> str:
    """Return the one limit of the result that is most worth knowing."""
    arms, ratios = result.arms, result.ratios
    if not math.isfinite(result.target.value):
        return "No run without batch norm set a target; only test scores can be compared."
    if not result.headline:
        counted = "steps are counted on the validation loss and " if result.target.measure == "loss" else ""
        return (
            f"Only {validation_rows} validation rows: {counted}no ratio is claimed, because one row more or "
            "less would change it."
        )
    seeds = len(arms["none"].steps)
    confidence = min(ratio.confidence for ratio in ratios.values())
    if confidence < CONFIDENCE:
        return (
            f"With {seeds} seeds an interval contains the true ratio with at most {100 * confidence:.3g}% confidence, "
            "too little for a claim: use 6 seeds or more."
        )
    open_ended = sum(ratio.at_least + ratio.at_most + ratio.unknown for ratio in ratios.values())
    if open_ended:
        return (
            f"In {open_ended} of the {len(ratios)} x {seeds} pairs a run does not reach the target within the steps "
            "trained; such a pair only bounds the ratio."
        )
    edges = {result.grid[0], result.grid[-1]}
    at_edge = [arm for arm, values in arms.items() if values.learning_rate in edges]
    if at_edge and len(result.grid) > 1:
        names = ", ".join(at_edge)
        return f"The best learning rate of {names} is at the edge of the grid: a rate beyond it may be better."
    return "The interval covers initial weights and batch order, given one split of the data and this set-up."
