"""Which learning rates train, how well, and how much the loss changes from one step to the next."""

from __future__ import annotations

from typing import Any

from batchnorm.lab.report.figures.bands import band, band_rows, of_arms, step_axis
from batchnorm.lab.report.figures.downloads import Data
from batchnorm.lab.report.figures.evidence import Evidence
from batchnorm.lab.report.figures.figure import PHRASES, Axis, Figure, Plot, Rule, listed
from batchnorm.lab.report.figures.sweeps import (
    median,
    median_of_scores,
    score_rows,
    share_axis,
    share_series,
    sweep_table,
)

__all__ = ["stability"]


def stability(evidence: Evidence, details: dict[str, Any]) -> Figure | None:
    """Share of seeds that train and scores by learning rate, and the change of the loss a step."""
    if "rates" not in details:
        return None
    rates, trains, scores = details["rates"], of_arms(details["trains"]), of_arms(details["scores"])
    seeds = max(len(at) for by_rate in scores.values() for at in by_rate)
    x = Axis(
        "learning rate", "log", ticks=[(rate, f"{rate:g}") for rate in rates], range=(rates[0] / 1.6, rates[-1] * 1.6)
    )
    threshold = details["threshold"]
    plots = [
        Plot("Seeds that train", x, share_axis(), [share_series(arm, rates, s, seeds) for arm, s in trains.items()]),
        Plot(
            f"Validation {evidence.score_name} at the end",
            x,
            Axis(""),
            [median_of_scores(arm, rates, by_rate) for arm, by_rate in scores.items()],
            [] if threshold is None else [Rule("y", threshold, "trains")],
        ),
    ]
    changes = of_arms(details.get("loss_change", {}))
    if changes:
        steps = next(iter(changes.values()))["steps"]
        changes = {arm: values["change"] for arm, values in changes.items()}
        drawn = [band(arm, steps, values) for arm, values in changes.items()]
        plots.append(Plot("Change of the loss in a step", step_axis(steps), Axis("", "log"), drawn))
    widths = [f"{median(values):.2g} {PHRASES[arm]}" for arm, values in of_arms(details["width"]).items()]
    return Figure(
        key="stability",
        title="Learning rates that train",
        finding=f"The median seed trains over this many decades of learning rate: {listed(widths)}.",
        note=(
            f"{seeds} seeds at each learning rate, {details['steps']} steps each; marks of the seeds that train are "
            "set side by side so that none hides another. At the end: the mean of a run's last three scores, its "
            "median over the seeds and their range; a diverged run has the worst score, which is not drawn. Change of "
            "the loss: of a mini-batch to the next, the mean of its absolute value since the evaluation before, each "
            "arm at its own learning rate; median and middle half over the seeds."
        ),
        plots=plots,
        table=sweep_table("learning rate", rates, trains, scores, of_arms(details["diverged"])),
        data=Data(
            "every score at the end, and the change of the loss",
            ["what", "arm", "learning rate", "step", "seed", "value", "low", "high"],
            [
                *(["score at the end", arm, rate, None, seed, score, None, None]
                  for arm, rate, seed, score in score_rows(rates, scores)),
                *(["change of the loss", arm, None, *rest[:1], None, *rest[1:]]
                  for arm, *rest in band_rows((), steps if changes else [], changes)),
            ],
        ),
    )  # fmt: skip
