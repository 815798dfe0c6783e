"""From which initial weights the network trains, and in how many steps."""

from __future__ import annotations

from typing import Any

from batchnorm.lab.comparison.verdict import steps_text
from batchnorm.lab.report.figures.bands import of_arms
from batchnorm.lab.report.figures.beyond import placed, steps_axis, zone_rule
from batchnorm.lab.report.figures.downloads import Data
from batchnorm.lab.report.figures.evidence import Evidence
from batchnorm.lab.report.figures.figure import PHRASES, Axis, Figure, Plot, Rule, Series, listed
from batchnorm.lab.report.figures.sweeps import (
    median,
    median_of_scores,
    score_rows,
    share_axis,
    share_series,
    sweep_table,
)
from batchnorm.lab.training.runs import median_steps

__all__ = ["initial_weights"]

USUAL = Rule("x", 1.0, "")


def _axis(scales: list[float]) -> Axis:
    return Axis(
        "initial weights, times those set up",
        "log",
        ticks=[(scale, f"{scale:g}") for scale in scales],
        range=(scales[0] / 2, scales[-1] * 2),
    )


def _steps(arrivals: dict[str, Any], scales: list[float], x: Axis, steps: int) -> Plot:
    """Median steps to the score of a run that trains."""
    series: list[Series] = []
    every = []
    for arm, by_scale in arrivals.items():
        counts = [median_steps(at) for at in by_scale]
        every += counts
        said = [
            f"{sum(step is not None for step in at)} of {len(at)} seeds arrive, median {steps_text(count, steps)}"
            for at, count in zip(by_scale, counts, strict=True)
        ]
        series += placed(arm, scales, counts, steps, said)
    return Plot("Median steps to that score", x, steps_axis("", every, steps), series, [zone_rule("y", steps), USUAL])


def initial_weights(evidence: Evidence, details: dict[str, Any]) -> Figure | None:
    """Share of seeds that train, scores and steps, by the size of the initial weights."""
    if "scales" not in details:
        return None
    scales, steps, threshold = details["scales"], details["steps"], details["threshold"]
    trains, scores = of_arms(details["trains"]), of_arms(details["scores"])
    arrivals = of_arms(details.get("arrivals") or {})
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
            [USUAL] if threshold is None else [Rule("y", threshold, "trains"), USUAL],
        ),
    ]
    if arrivals:
        plots.append(_steps(arrivals, scales, x, steps))
    widths = [f"{median(values):.2g} {PHRASES[arm]}" for arm, values in of_arms(details["width"]).items()]
    return Figure(
        key="initial_weights",
        title="Initial weights that train",
        finding=f"The median seed trains over this many decades of initial weights: {listed(widths)}.",
        note=(
            f"{seeds} seeds at each size of the initial weights, {steps} steps each, each arm at its own learning "
            "rate; marks of the seeds that train are set side by side so that none hides another. At the end: the mean "
            "of a run's last three scores, its median over the seeds and their range. Dashed: as set up."
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
