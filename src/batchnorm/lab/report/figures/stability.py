"""Figure of the learning rates that train, their scores, and the change of the loss per step."""

from __future__ import annotations

from batchnorm.lab.claims.stability import StabilityDetails
from batchnorm.lab.report.figures.bands import band, band_rows, in_order_of_arms, step_axis
from batchnorm.lab.report.figures.downloads import Data
from batchnorm.lab.report.figures.evidence import Evidence
from batchnorm.lab.report.figures.figure import PHRASES, Axis, Figure, Plot, ReferenceLine, listed
from batchnorm.lab.report.figures.sweeps import (
    median,
    median_of_scores,
    score_rows,
    share_axis,
    share_series,
    sweep_table,
)

__all__ = ["stability"]


def stability(evidence: Evidence, details: StabilityDetails) -> Figure:
    """Return the share of seeds that train and their scores by learning rate, and the change of the loss per step."""
    rates, trains, scores = details.rates, in_order_of_arms(details.trains), in_order_of_arms(details.scores)
    seeds = max(len(at) for by_rate in scores.values() for at in by_rate)
    x = Axis(
        "learning rate", "log", ticks=[(rate, f"{rate:g}") for rate in rates], range=(rates[0] / 1.6, rates[-1] * 1.6)
    )
    threshold = details.threshold
    plots = [
        Plot("Seeds that train", x, share_axis(), [share_series(arm, rates, s, seeds) for arm, s in trains.items()]),
        Plot(
            f"Validation {evidence.score_name} at the end",
            x,
            Axis(""),
            [median_of_scores(arm, rates, by_rate) for arm, by_rate in scores.items()],
            [] if threshold is None else [ReferenceLine("y", threshold, "trains")],
        ),
    ]
    changes = {arm: loss_change.change for arm, loss_change in in_order_of_arms(details.loss_change).items()}
    steps = next((loss_change.steps for loss_change in details.loss_change.values()), [])
    if changes:
        drawn = [band(arm, steps, values) for arm, values in changes.items()]
        plots.append(Plot("Change of the loss per step", step_axis(steps), Axis("", "log"), drawn))
    widths = [f"{median(values):.2g} {PHRASES[arm]}" for arm, values in in_order_of_arms(details.width).items()]
    return Figure(
        key="stability",
        title="Learning rates that train",
        finding=f"The median seed trains over this many decades of learning rate: {listed(widths)}.",
        note=(
            f"{seeds} seeds at each learning rate, {details.steps} steps each; marks of the seeds that train are "
            "placed side by side so that none hides another. At the end: the mean of a run's last three scores, its "
            "median over the seeds and their range; a diverged run has the worst score, which is not drawn. Change of "
            "the loss: of a mini-batch to the next, the mean of its absolute value since the evaluation before, each "
            "arm at its own learning rate; median and middle half over the seeds."
        ),
        plots=plots,
        table=sweep_table("learning rate", rates, trains, scores, in_order_of_arms(details.diverged)),
        data=Data(
            "every score at the end, and the change of the loss",
            ["quantity", "arm", "learning rate", "step", "seed", "value", "low", "high"],
            [
                *(["score at the end", arm, rate, None, seed, score, None, None]
                  for arm, rate, seed, score in score_rows(rates, scores)),
                *(["change of the loss", arm, None, *rest[:1], None, *rest[1:]]
                  for arm, *rest in band_rows((), steps, changes)),
            ],
        ),
    )  # fmt: skip
