"""Figures of loss and score over training: the race, and the curves."""

from __future__ import annotations

import math

import numpy as np

from batchnorm.lab.comparison.measures import QuartileBand
from batchnorm.lab.report.figures.controls import TIME, X_SCALE, Y_SCALE, Control
from batchnorm.lab.report.figures.evidence import Curve, Evidence, quartiles
from batchnorm.lab.report.figures.figure import (
    LABELS,
    PHRASES,
    Axis,
    Figure,
    FigureTable,
    Plot,
    ReferenceLine,
    Series,
    listed,
    shown,
)
from batchnorm.lab.training.runs import Measure, median_steps

__all__ = ["curves", "race"]

EVERY = 4


def _series(arm: str, evaluations: list[int], curve: QuartileBand) -> Series:
    return Series(arm, evaluations, curve.median, curve.low, curve.high)


def _loss_scale(bands: dict[str, QuartileBand]) -> Axis:
    """Return an axis for a loss: logarithmic, unless a loss is 0."""
    positive = all(low > 0 for curve in bands.values() for low in curve.low)
    return Axis("", "log", switch="y") if positive else Axis("")


def _table(evidence: Evidence, bands: dict[str, dict[str, QuartileBand]]) -> FigureTable:
    """Return medians with their middle halves, at some of the evaluations."""
    last = len(evidence.evaluations) - 1
    chosen = sorted({*range(0, last + 1, EVERY), last})
    columns = ["step"] + [f"{name}, {LABELS[arm]}" for name, by_arm in bands.items() for arm in by_arm]
    rows = [
        [
            str(evidence.evaluations[i]),
            *(
                f"{shown(curve.median[i])} [{shown(curve.low[i])}, {shown(curve.high[i])}]"
                for by_arm in bands.values()
                for curve in by_arm.values()
            ),
        ]
        for i in chosen
    ]
    return FigureTable(columns, rows)


def _bands(evidence: Evidence, curve: Curve) -> dict[str, QuartileBand]:
    return {arm: quartiles(runs, curve) for arm, runs in evidence.trained.items()}


def _note(evidence: Evidence) -> str:
    return (
        f"Lines are medians and bands at least the middle half of {evidence.drawn}. A diverged run counts as the worst."
    )


def _arrival(evidence: Evidence, arm: str, curve: QuartileBand) -> Series | None:
    """Return a mark on an arm's line where its median run reaches the target."""
    if not (evidence.confirmed and evidence.target):
        return None
    steps = median_steps(next(arrivals for name, arrivals in evidence.arrivals.items() if name == arm))
    if steps is None:
        return None
    height = float(np.interp(steps, evidence.evaluations, curve.median))
    text = f"the median run {PHRASES[arm]} reaches the target at step {steps:.0f}"
    return Series(arm, [steps], [height], line=False, marks=["known"], text=[text])


def _target_line(evidence: Evidence, measure: Measure) -> list[ReferenceLine]:
    aim = evidence.aim(measure)
    return [] if aim is None else [ReferenceLine("y", aim, "target")]


def race(evidence: Evidence) -> Figure:
    """Return the validation loss by step, and by second once the time per step is measured."""
    bands = _bands(evidence, "validation_loss")
    series = [_series(arm, evidence.evaluations, curve) for arm, curve in bands.items()]
    marks = [_arrival(evidence, arm, curve) for arm, curve in bands.items()]
    series += [mark for mark in marks if mark]
    lines = _target_line(evidence, "loss")
    loss = _loss_scale(bands)
    plots = [Plot("By gradient step", Axis("gradient steps", "log", "steps", "x"), loss, series, lines)]
    finding = _best_losses(evidence, bands)
    if evidence.seconds:
        seconds = Axis("seconds of one thread", "log", "seconds", "x")
        plots.append(Plot("By second", seconds, loss, series, lines))
        each = [f"{1000 * value:.2g} ms {PHRASES[arm]}" for arm, value in evidence.seconds.items()]
        finding += f" A step takes {listed(each)}."
    arrived = " A marker is where the median run reaches the target." if any(marks) else ""
    return Figure(
        key="race",
        title=f"Validation loss ({evidence.loss_name})",
        finding=finding,
        note=_note(evidence) + arrived,
        plots=plots,
        table=_table(evidence, {"validation loss": bands}),
        controls=_scales(loss),
        replay=True,
    )


def _scales(loss: Axis) -> tuple[Control, ...]:
    return (X_SCALE, Y_SCALE) if loss.switch else (X_SCALE,)


def _best_losses(evidence: Evidence, bands: dict[str, QuartileBand]) -> str:
    """Return the least median loss of each arm and its step, in words."""
    parts = []
    for arm, curve in bands.items():
        at = int(np.argmin(curve.median))
        if math.isfinite(curve.median[at]):
            parts.append(f"{curve.median[at]:.3g} at step {evidence.evaluations[at]} {PHRASES[arm]}")
        else:
            parts.append(f"not finite {PHRASES[arm]}")
    return f"The median validation loss is least at {listed(parts)}."


def curves(evidence: Evidence) -> Figure:
    """Return training loss and validation score, against steps or seconds."""
    losses, scores = _bands(evidence, "train_loss"), _bands(evidence, "validation_score")
    time = Axis("gradient steps", "log", "chosen", "x")
    loss = _loss_scale(losses)
    highest = {arm: float(np.max(curve.median)) for arm, curve in scores.items()}
    parts = [
        f"{value:.3f} {PHRASES[arm]}" if math.isfinite(value) else f"not finite {PHRASES[arm]}"
        for arm, value in highest.items()
    ]
    name = evidence.score_name
    return Figure(
        key="curves",
        title=f"Training loss and validation {name}",
        finding=f"The median validation {name} is at most {listed(parts)}.",
        note=_note(evidence) + " The training loss is the mean over the mini-batches since the evaluation before.",
        plots=[
            Plot(
                f"Training loss ({evidence.loss_name})",
                time,
                loss,
                [_series(arm, evidence.evaluations, curve) for arm, curve in losses.items()],
            ),
            Plot(
                f"Validation {name}",
                time,
                Axis("", range=_score_range(highest, scores)),
                [_series(arm, evidence.evaluations, curve) for arm, curve in scores.items()],
                _target_line(evidence, "score"),
            ),
        ],
        table=_table(evidence, {"training loss": losses, f"validation {name}": scores}),
        controls=((TIME,) if evidence.seconds else ()) + _scales(loss),
    )


def _score_range(highest: dict[str, float], scores: dict[str, QuartileBand]) -> tuple[float, float] | None:
    """Return limits that show the scores above -0.5, because an R squared may start anywhere below."""
    lows = [min((low for low in curve.low if math.isfinite(low)), default=1.0) for curve in scores.values()]
    if min(lows) >= -0.5 or not any(value > -0.5 for value in highest.values()):
        return None
    top = max(value for curve in scores.values() for value in curve.high)
    return -0.5, float(top) + 0.05
