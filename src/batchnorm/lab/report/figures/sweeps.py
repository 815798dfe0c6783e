"""What sweeps of learning rates and of initial weights have in common: who trains at each value, and how well."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from batchnorm.lab.report.figures.figure import LABELS, PHRASES, Axis, Series, Table, Value, shown

__all__ = ["Scores", "median", "median_of_scores", "score_rows", "share_axis", "share_series", "sweep_table"]

Scores = Sequence[Sequence[Value]]
BESIDE = {"none": 0.93, "before": 1.0, "after": 1.07}
LOWEST = -0.5  # an R2 further down would leave no room to tell the others apart


def share_axis() -> Axis:
    """An axis of shares of the seeds, from none to all."""
    return Axis("", ticks=[(0, "none"), (0.5, "half"), (1, "all")], range=(-0.06, 1.06))


def share_series(arm: str, x: Sequence[float], shares: Sequence[float], seeds: int) -> Series:
    """Shares of the seeds of an arm, set beside those of the others on a logarithmic axis."""
    said = [
        f"{share * seeds:.0f} of {seeds} seeds at {at:g} {PHRASES[arm]}" for at, share in zip(x, shares, strict=True)
    ]
    return Series(arm, [at * BESIDE[arm] for at in x], shares, marks=["known"] * len(said), text=said)


def score_rows(x: Sequence[float], scores: Mapping[str, Scores]) -> list[tuple[str, float, int, Value]]:
    """Rows of data of a sweep: arm, x, number of the seed, value."""
    return [
        (arm, at, seed, value)
        for arm, by_x in scores.items()
        for at, values in zip(x, by_x, strict=True)
        for seed, value in enumerate(values, 1)
    ]


def sweep_table(
    name: str,
    x: Sequence[float],
    trains: Mapping[str, Sequence[float]],
    scores: Mapping[str, Scores],
    diverged: Mapping[str, Sequence[float]] | None = None,
) -> Table:
    """A row for each arm and value swept: seeds that train and diverge, and their scores."""
    columns = ["batch norm", name, "train", *(["diverge"] if diverged else []), "score at the end, median", "range"]
    rows = []
    for arm, by_x in scores.items():
        for i, (at, values) in enumerate(zip(x, by_x, strict=True)):
            known = [value for value in values if value is not None]
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
    return Table(columns, rows)


def median(values: Sequence[Value]) -> float:
    """Median of what one seed each gave; none is the worst there is."""
    ordered = sorted(-math.inf if value is None else value for value in values)
    middle = len(ordered) // 2
    return ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2


def median_of_scores(arm: str, x: Sequence[float], scores: Scores) -> Series:
    """Median and range over seeds of the scores at each x; that of a diverged run is the worst, and not drawn."""
    whole = [[-math.inf if score is None else score for score in at] for at in scores]
    drawn = [[score if score >= LOWEST else None for score in (median(at), min(at), max(at))] for at in whole]
    return Series(
        arm, x, [d[0] for d in drawn], [d[1] for d in drawn], [d[2] for d in drawn], marks=["known"] * len(drawn)
    )
