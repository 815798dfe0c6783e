"""Parts shared by the figures of sweeps over learning rates and over initial weights."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from batchnorm.lab.report.figures.bands import is_known
from batchnorm.lab.report.figures.figure import LABELS, PHRASES, Axis, FigureTable, Series, Value, shown
from batchnorm.lab.training.settings import Arm

__all__ = ["Scores", "median", "median_of_scores", "score_rows", "share_axis", "share_series", "sweep_table"]

Scores = Sequence[Sequence[Value]]
BESIDE = {"none": 0.93, "before": 1.0, "after": 1.07}
LOWEST = -0.5  # an R2 further down would leave no room to tell the others apart


def share_axis() -> Axis:
    """Return an axis of shares of the seeds, from none to all."""
    return Axis("", ticks=[(0, "none"), (0.5, "half"), (1, "all")], range=(-0.06, 1.06))


def share_series(arm: str, x: Sequence[float], shares: Sequence[float], seeds: int) -> Series:
    """Return the shares of the seeds of an arm, beside those of the others on a logarithmic axis."""
    texts = [
        f"{share * seeds:.0f} of {seeds} seeds at {at:g} {PHRASES[arm]}" for at, share in zip(x, shares, strict=True)
    ]
    return Series(arm, [at * BESIDE[arm] for at in x], shares, marks=["known"] * len(texts), text=texts)


def score_rows(x: Sequence[float], scores: Mapping[Arm, Scores]) -> list[tuple[str, float, int, Value]]:
    """Return rows of data of a sweep: arm, x, number of the seed, value."""
    return [
        (arm, at, seed, value)
        for arm, by_x in scores.items()
        for at, values in zip(x, by_x, strict=True)
        for seed, value in enumerate(values, 1)
    ]


def sweep_table(
    name: str,
    x: Sequence[float],
    trains: Mapping[Arm, Sequence[float]],
    scores: Mapping[Arm, Scores],
    diverged: Mapping[Arm, Sequence[float]] | None = None,
) -> FigureTable:
    """Return a row per arm and swept value: the seeds that train and diverge, and their scores."""
    columns = ["batch norm", name, "train", *(["diverge"] if diverged else []), "score at the end, median", "range"]
    rows = []
    for arm, by_x in scores.items():
        for i, (at, values) in enumerate(zip(x, by_x, strict=True)):
            known = [value for value in values if value is not None and is_known(value)]
            rows.append(
                [
                    LABELS[arm],
                    f"{at:g}",
                    f"{trains[arm][i]:.0%}",
                    *([f"{diverged[arm][i]:.0%}"] if diverged else []),
                    shown(median(values)),
                    f"{shown(min(known))} to {shown(max(known))}" if known else "-",
                ]
            )
    return FigureTable(columns, rows)


def median(values: Sequence[Value]) -> float:
    """Return the median over seeds; a missing value counts as the worst."""
    ordered = sorted(map(_worst_if_missing, values))
    middle = len(ordered) // 2
    return ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2


def _worst_if_missing(score: Value) -> float:
    return -math.inf if score is None or math.isnan(score) else score


def median_of_scores(arm: str, x: Sequence[float], scores: Scores) -> Series:
    """Return median and range over seeds of the scores at each x; a diverged run has the worst, which is not drawn."""
    whole = [[_worst_if_missing(score) for score in at] for at in scores]
    drawn = [[score if score >= LOWEST else None for score in (median(at), min(at), max(at))] for at in whole]
    return Series(
        arm, x, [d[0] for d in drawn], [d[1] for d in drawn], [d[2] for d in drawn], marks=["known"] * len(drawn)
    )
