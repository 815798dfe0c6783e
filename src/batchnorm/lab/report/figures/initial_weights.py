"""Figure of the initial weights from which the network trains, and of the steps that it needs."""

from __future__ import annotations

from collections.abc import Mapping

from batchnorm.lab.claims.initial_weights import InitialWeightsDetails
from batchnorm.lab.comparison.verdict import steps_text
from batchnorm.lab.report.figures.bands import in_order_of_arms
from batchnorm.lab.report.figures.beyond import steps_axis, steps_series, zone_line
from batchnorm.lab.report.figures.downloads import Data
from batchnorm.lab.report.figures.evidence import Evidence
from batchnorm.lab.report.figures.figure import PHRASES, Axis, Figure, Plot, ReferenceLine, Series, listed
from batchnorm.lab.report.figures.sweeps import (
    median,
    median_of_scores,
    score_rows,
    share_axis,
    share_series,
    sweep_table,
)
from batchnorm.lab.training.runs import median_steps
from batchnorm.lab.training.settings import Arm

__all__ = ["initial_weights"]

USUAL = ReferenceLine("x", 1.0, "")


def _axis(scales: list[float]) -> Axis:
    return Axis(
        "initial weights, times those set up",
        "log",
        ticks=[(scale, f"{scale:g}") for scale in scales],
        range=(scales[0] / 2, scales[-1] * 2),
    )


def _steps(arrivals: Mapping[Arm, list[list[int | None]]], scales: list[float], x: Axis, steps: int) -> Plot:
    """Return the median steps to the score of a run that trains."""
    series: list[Series] = []
    all_counts = []
    for arm, by_scale in arrivals.items():
        counts = [median_steps(at) for at in by_scale]
        all_counts += counts
        texts = [
            f"{sum(step is not None for step in at)} of {len(at)} seeds arrive, median {steps_text(count, steps)}"
            for at, count in zip(by_scale, counts, strict=True)
        ]
        series += steps_series(arm, scales, counts, steps, texts)
    return Plot(
        "Median steps to that score", x, steps_axis("", all_counts, steps), series, [zone_line("y", steps), USUAL]
    )


def initial_weights(evidence: Evidence, details: InitialWeightsDetails) -> Figure:
    """Return the share of seeds that train, scores and steps, by the size of the initial weights."""
    scales, steps, threshold = details.scales, details.steps, details.threshold
    trains, scores = in_order_of_arms(details.trains), in_order_of_arms(details.scores)
    arrivals = in_order_of_arms(details.arrivals)
    seeds = max(len(at) for by_scale in scores.values() for at in by_scale)
    x, steps_to = _axis(scales), score_rows(scales, arrivals)
    plots = [
        Plot(
            "Seeds that train",
            x,
            share_axis(),
            [share_series(arm, scales, shares, seeds) for arm, shares in trains.items()],
            [USUAL],
        ),
        Plot(
            f"Validation {evidence.score_name} at the end",
            x,
            Axis(""),
            [median_of_scores(arm, scales, by_scale) for arm, by_scale in scores.items()],
            [USUAL] if threshold is None else [ReferenceLine("y", threshold, "trains"), USUAL],
        ),
    ]
    if arrivals:
        plots.append(_steps(arrivals, scales, x, steps))
    widths = [f"{median(values):.2g} {PHRASES[arm]}" for arm, values in in_order_of_arms(details.width).items()]
    return Figure(
        key="initial_weights",
        title="Initial weights that train",
        finding=f"The median seed trains over this many decades of initial weights: {listed(widths)}.",
        note=(
            f"{seeds} seeds at each size of the initial weights, {steps} steps each, each arm at its own learning "
            "rate; marks of the seeds that train are placed side by side so that none hides another. At the end: the "
            "mean of a run's last three scores, as the median over the seeds and their range. Dashed: as set up."
            + (f" Shaded: most seeds do not arrive within {steps} steps." if arrivals else "")
        ),
        plots=plots,
        table=sweep_table("initial weights, times", scales, trains, scores),
        data=Data(
            "score and steps of every run",
            ["arm", "initial weights, times", "seed", "score at the end", "steps to the score of a run that trains"],
            [[*row, steps_to[i][-1] if steps_to else None] for i, row in enumerate(score_rows(scales, scores))],
        ),
    )
