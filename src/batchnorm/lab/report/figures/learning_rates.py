"""Figure of the learning rate: the score reached and the steps taken at each rate searched."""

from __future__ import annotations

import math

import numpy as np

from batchnorm.lab.comparison.measures import RateSummary
from batchnorm.lab.comparison.verdict import steps_text
from batchnorm.lab.report.figures.beyond import steps_axis, steps_series, zone_line
from batchnorm.lab.report.figures.evidence import Evidence
from batchnorm.lab.report.figures.figure import LABELS, PHRASES, Axis, Figure, FigureTable, Plot, Series, listed, shown
from batchnorm.lab.training.runs import Run
from batchnorm.lab.training.settings import ARMS, Arm

__all__ = ["learning_rates"]

LOWEST = -0.5  # an R2 further down would leave no room to tell the others apart


def _best_scores(runs: list[Run], rate: float) -> list[float]:
    """Return the sorted best validation scores of the runs at a learning rate; a diverged run has the worst."""
    here = [run for run in runs if run.learning_rate == rate]
    return sorted(-math.inf if run.diverged_at is not None else max(run.validation_score) for run in here)


def _rate_axis(rates: list[float]) -> Axis:
    return Axis(
        "learning rate", "log", ticks=[(rate, f"{rate:g}") for rate in rates], range=(rates[0] / 1.5, rates[-1] * 1.5)
    )


def _scores(evidence: Evidence, rates: dict[Arm, list[float]], x: Axis) -> Plot:
    """Return the best validation score against the learning rate, as median and range over the search seeds."""
    series = []
    for arm in evidence.arms:
        scores = [_best_scores(evidence.search[arm], rate) for rate in rates[arm]]
        medians = [float(np.median(values)) for values in scores]
        series.append(
            Series(
                arm,
                rates[arm],
                [median if median >= LOWEST else None for median in medians],
                [values[0] if values[0] >= LOWEST else None for values in scores],
                [values[-1] for values in scores],
                marks=["known"] * len(medians),
            )
        )
    return Plot(
        f"Best validation {evidence.score_name}",
        x,
        Axis(""),
        series,
    )


def _steps(evidence: Evidence, summaries: dict[Arm, list[RateSummary]], x: Axis) -> Plot:
    """Return the median steps to the target over the search seeds, against the learning rate."""
    steps = evidence.settings.steps
    series: list[Series] = []
    for arm, rows in summaries.items():
        texts = [f"{row.reached} of {row.seeds} seeds, {steps_text(row.median_steps, steps)}" for row in rows]
        searched, medians = [row.learning_rate for row in rows], [row.median_steps for row in rows]
        series += steps_series(arm, searched, medians, steps, texts)
    counts = [row.median_steps for rows in summaries.values() for row in rows]
    return Plot("Median steps to the target", x, steps_axis("", counts, steps), series, [zone_line("y", steps)])


def _table(evidence: Evidence, rates: dict[Arm, list[float]], summaries: dict[Arm, list[RateSummary]]) -> FigureTable:
    columns = ["batch norm", "learning rate", "seeds", "diverged", f"best {evidence.score_name}, median"]
    rows = []
    for arm in evidence.arms:
        for i, rate in enumerate(rates[arm]):
            runs = [run for run in evidence.search[arm] if run.learning_rate == rate]
            diverged = sum(run.diverged_at is not None for run in runs)
            median = float(np.median(_best_scores(runs, rate)))
            row = [LABELS[arm], f"{rate:g}", str(len(runs)), str(diverged), shown(median)]
            if summaries:
                here = summaries[arm][i]
                row += [str(here.reached), steps_text(here.median_steps, evidence.settings.steps)]
            rows.append(row)
    return FigureTable(columns + (["seeds that reach the target", "median steps"] if summaries else []), rows)


def learning_rates(evidence: Evidence) -> Figure:
    """Return score and steps to the target against the learning rate, as far as they were searched."""
    rates = {arm: sorted({run.learning_rate for run in evidence.search[arm]}) for arm in evidence.arms}
    grid = sorted({rate for values in rates.values() for rate in values})
    x = _rate_axis(grid)
    plots = [_scores(evidence, rates, x)]
    summaries: dict[Arm, list[RateSummary]] = {}
    if evidence.result:
        arms = evidence.result.arms
        summaries = {arm: arms[arm].search for arm in ARMS}
        plots.append(_steps(evidence, summaries, x))
        reach = [f"{arms[arm].rates_that_reach} of {len(summaries[arm])} {PHRASES[arm]}" for arm in ARMS]
        finding = f"Learning rates at which every search seed reaches the target: {listed(reach)}."
    else:
        best = [f"{evidence.rates[arm]:g} {PHRASES[arm]}" for arm in evidence.arms]
        finding = f"The best learning rate so far is {listed(best)}."
    return Figure(
        key="rates",
        title="Learning rate",
        finding=finding,
        note=(
            "Medians over the search seeds; the band of the score is their range. A diverged run never arrives and has "
            f"the worst score; below {LOWEST:g} no score is drawn."
            + (f" Shaded: most seeds do not arrive within {evidence.settings.steps} steps." if summaries else "")
        ),
        plots=plots,
        table=_table(evidence, rates, summaries),
    )
