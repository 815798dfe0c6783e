"""Figures of the target: steps to every score, and the ratio of steps against the target."""

from __future__ import annotations

import math

from batchnorm.lab.comparison.measures import Bounds, PairSummary, ratio_bounds, summarize_pairs
from batchnorm.lab.comparison.verdict import factor_text, ratio_text, steps_text
from batchnorm.lab.report.figures.controls import SCALES, Control
from batchnorm.lab.report.figures.evidence import Evidence
from batchnorm.lab.report.figures.figure import (
    LABELS,
    PHRASES,
    Axis,
    Figure,
    FigureTable,
    Mark,
    Plot,
    ReferenceLine,
    Series,
    Value,
    listed,
)
from batchnorm.lab.training.runs import CONSECUTIVE, Measure, median_steps
from batchnorm.lab.training.settings import ARMS

__all__ = ["every_score", "moving_target"]

SCORE_TICKS = (0, 0.2, 0.5, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.998, 0.999)
TENTHS = (0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


def _position(evidence: Evidence, measure: Measure, level: float) -> float:
    """Return the position of a level on its axis: a loss at its value, a score at 1 less it (at least half a row)."""
    return level if measure == "loss" else max(1 - level, 0.5 / evidence.data.rows["validation"])


def _axis(evidence: Evidence, measure: Measure, levels: list[float], title: str) -> Axis:
    """Return a logarithmic axis of levels, the hard ones to the right."""
    positions = [_position(evidence, measure, level) for level in levels]
    margin = (max(positions) / min(positions)) ** 0.03
    limits = (max(positions) * margin, min(positions) / margin)
    if measure == "loss":
        return Axis(title, "log", range=limits)
    scores = SCORE_TICKS if max(positions) > 5 * min(positions) else TENTHS
    ticks = [(1 - score, f"{score:g}") for score in scores if limits[1] <= 1 - score <= limits[0]]
    return Axis(title, "log", range=limits, ticks=ticks)


def _target_line(evidence: Evidence, measure: Measure) -> list[ReferenceLine]:
    aim = evidence.aim(measure)
    return [] if aim is None else [ReferenceLine("x", _position(evidence, measure, aim), "target")]


def every_score(evidence: Evidence) -> Figure | None:
    """Return the median steps to every score, by the rule of the target; None where no score is known."""
    levels = evidence.levels("score")
    if not levels:
        return None
    steps = evidence.settings.steps
    medians = {
        arm: [median_steps(counts) for counts in arrivals]
        for arm, arrivals in evidence.steps_to_levels("score").items()
    }
    highest = []
    for arm, counts in medians.items():
        reached = [level for level, count in zip(levels, counts, strict=True) if count is not None]
        highest.append(f"{max(reached):.3g} {PHRASES[arm]}" if reached else f"none {PHRASES[arm]}")
    name = evidence.score_name
    return Figure(
        key="scores",
        title="Steps to every score",
        finding=f"The highest {name} that most runs reach within {steps} steps is {listed(highest)}.",
        note=(
            f"Median steps over {evidence.drawn} to a validation {name}, at {CONSECUTIVE} consecutive evaluations. "
            f"A line ends where at least half of the runs do not reach the score within {steps} steps."
        ),
        plots=[
            Plot(
                f"Median steps to a validation {name}",
                _axis(evidence, "score", levels, f"validation {name}"),
                Axis("", "log", switch="y"),
                [
                    Series(
                        arm,
                        [_position(evidence, "score", level) for level in levels],
                        counts,
                        text=[
                            f"{level:.3f}: {steps_text(count, steps)} steps {PHRASES[arm]}"
                            for level, count in zip(levels, counts, strict=True)
                        ],
                    )
                    for arm, counts in medians.items()
                ],
                _target_line(evidence, "score"),
            )
        ],
        controls=(Control("y", "Vertical axis", SCALES),),
        table=FigureTable(
            [f"validation {name}", *(LABELS[arm] for arm in medians)],
            [
                [f"{level:.4f}", *(steps_text(counts[i], steps) for counts in medians.values())]
                for i, level in enumerate(levels)
            ],
        ),
    )


def _ratio_position(bounds: Bounds) -> tuple[Value, Mark]:
    """Return the position and mark of a median ratio: its value, or the bound that is known."""
    lower, upper = bounds
    if lower == upper:
        return lower, "known"
    if lower > 0:
        return lower, "at least"
    return (upper, "at most") if upper < math.inf else (None, "beyond")


def _ratio_series(arm: str, x: list[float], ratios: list[PairSummary], top: float) -> list[Series]:
    """Return a line through the known medians in the band of their intervals, and marks at the bounds of others."""
    positions = [_ratio_position(ratio.median) for ratio in ratios]
    texts = [f"ratio of steps {ratio_text(ratio)} {PHRASES[arm]}" for ratio in ratios]
    line = Series(
        arm,
        x,
        [y if mark == "known" else None for y, mark in positions],
        [max(ratio.interval[0], 1 / top) for ratio in ratios],
        [min(ratio.interval[1], top) for ratio in ratios],
        marks=["known"] * len(x),
        text=texts,
    )
    bounds = [i for i, (y, mark) in enumerate(positions) if mark != "known" and y is not None]
    marks = Series(
        arm,
        [x[i] for i in bounds],
        [positions[i][0] for i in bounds],
        line=False,
        marks=[positions[i][1] for i in bounds],
        text=[texts[i] for i in bounds],
    )
    return [line, marks] if bounds else [line]


def moving_target(evidence: Evidence) -> Figure | None:
    """Return the ratio of steps against the target; None where no ratio is claimed or its runs are missing."""
    target, result = evidence.target, evidence.result
    if target is None or result is None or not result.ratios or not result.headline:
        return None
    levels, steps = evidence.levels(target.measure), evidence.settings.steps
    arrivals = evidence.steps_to_levels(target.measure)
    some = [i for i in range(len(levels)) if any(count is not None for arm in ARMS for count in arrivals[arm][i])]
    if not some:
        return None
    levels = [levels[i] for i in some]
    ratios = {
        arm: [
            summarize_pairs(
                [ratio_bounds(a, b, steps) for a, b in zip(arrivals["none"][i], arrivals[arm][i], strict=True)]
            )
            for i in some
        ]
        for arm in ARMS[1:]
    }
    ends = [end for rows in ratios.values() for ratio in rows for end in (*ratio.median, *ratio.interval)]
    top = 2 * max([max(end, 1 / end) for end in ends if 0 < end < math.inf])
    name = evidence.score_name if target.measure == "score" else "loss"
    x = [_position(evidence, target.measure, level) for level in levels]
    here = min(range(len(levels)), key=lambda i: abs(levels[i] - target.value))
    chosen = sorted({here // 3, here * 2 // 3, here})
    changes = [
        f"{listed([factor_text(rows[i].median) for i in chosen])} fewer steps {PHRASES[arm]}"
        for arm, rows in ratios.items()
    ]
    where = listed([f"{levels[i]:.3g}" for i in chosen])
    return Figure(
        key="target",
        title="Target",
        finding=f"To a validation {name} of {where}: {'; '.join(changes)}.",
        note=(
            "Median of the paired ratios of steps, and its interval. An open triangle is a bound: the median is at "
            "least (pointing up) or at most (down) that; a band that runs off the edge has no end there."
        ),
        plots=[
            Plot(
                "Ratio of steps, without batch norm over with it",
                _axis(evidence, target.measure, levels, f"target: validation {name}"),
                Axis("", "log", range=_range(ends)),
                [series for arm, rows in ratios.items() for series in _ratio_series(arm, x, rows, top)],
                [ReferenceLine("y", 1.0, "no change"), *_target_line(evidence, target.measure)],
            )
        ],
        table=FigureTable(
            [f"target: validation {name}", *(LABELS[arm] for arm in ratios)],
            [[f"{level:.4g}", *(ratio_text(rows[i]) for rows in ratios.values())] for i, level in enumerate(levels)],
        ),
    )


def _range(ends: list[float]) -> tuple[float, float]:
    """Return limits that show every finite bound, and 1."""
    finite = [end for end in ends if 0 < end < math.inf]
    return min([0.7, *finite]) / 1.1, max([1.5, *finite]) * 1.2
