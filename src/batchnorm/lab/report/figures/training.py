"""Loss and score over training: the race, and the curves beside it."""

from __future__ import annotations

import math

import numpy as np

from batchnorm.lab.report.figures.controls import TIME, X_SCALE, Y_SCALE, Control
from batchnorm.lab.report.figures.evidence import Curve, Evidence, Spread, spread
from batchnorm.lab.report.figures.figure import (
    LABELS,
    PHRASES,
    Axis,
    Figure,
    Plot,
    Rule,
    Series,
    Table,
    listed,
    shown,
)
from batchnorm.lab.training.runs import Measure, median_steps

__all__ = ["curves", "race"]

EVERY = 4


def _series(arm: str, evaluations: list[int], curve: Spread) -> Series:
    return Series(arm, evaluations, [*curve.median], [*curve.low], [*curve.high])


def _loss_scale(spreads: dict[str, Spread]) -> Axis:
    """An axis for a loss: logarithmic, unless a loss is nil."""
    positive = all(np.all(curve.low > 0) for curve in spreads.values())
    return Axis("", "log", switch="y") if positive else Axis("")


def _table(evidence: Evidence, spreads: dict[str, dict[str, Spread]]) -> Table:
    """Medians with their middle halves, at some of the evaluations."""
    last = len(evidence.evaluations) - 1
    chosen = sorted({*range(0, last + 1, EVERY), last})
    columns = ["step"] + [f"{name}, {LABELS[arm]}" for name, by_arm in spreads.items() for arm in by_arm]
    rows = [
        [
            str(evidence.evaluations[i]),
            *(
                f"{shown(curve.median[i])} [{shown(curve.low[i])}, {shown(curve.high[i])}]"
                for by_arm in spreads.values()
                for curve in by_arm.values()
            ),
        ]
        for i in chosen
    ]
    return Table(columns, rows)


def _spreads(evidence: Evidence, curve: Curve) -> dict[str, Spread]:
    return {arm: spread(runs, curve) for arm, runs in evidence.trained.items()}


def _note(evidence: Evidence) -> str:
    return (
        f"Lines are medians and bands at least the middle half of {evidence.drawn}. A diverged run counts as the worst."
    )


def _arrival(evidence: Evidence, arm: str, curve: Spread) -> Series | None:
    """A mark on an arm's line where its median run arrives at the target."""
    if not (evidence.confirmed and evidence.target):
        return None
    steps = median_steps(next(arrivals for name, arrivals in evidence.arrivals.items() if name == arm))
    if steps is None:
        return None
    height = float(np.interp(steps, evidence.evaluations, curve.median))
    said = f"the median run {PHRASES[arm]} reaches the target at step {steps:.0f}"
    return Series(arm, [steps], [height], line=False, marks=["known"], text=[said])


def _rules(evidence: Evidence, measure: Measure) -> list[Rule]:
    aim = evidence.aim(measure)
    return [] if aim is None else [Rule("y", aim, "target")]


def race(evidence: Evidence) -> Figure:
    """Validation loss by step, and by second once the time of a step is measured."""
    spreads = _spreads(evidence, "validation_loss")
    series = [_series(arm, evidence.evaluations, curve) for arm, curve in spreads.items()]
    marks = [_arrival(evidence, arm, curve) for arm, curve in spreads.items()]
    series += [mark for mark in marks if mark]
    rules = _rules(evidence, "loss")
    loss = _loss_scale(spreads)
    plots = [Plot("By gradient step", Axis("gradient steps", "log", "steps", "x"), loss, series, rules)]
    finding = _best_losses(evidence, spreads)
    if evidence.seconds:
        seconds = Axis("seconds of one thread", "log", "seconds", "x")
        plots.append(Plot("By second", seconds, loss, series, rules))
        each = [f"{1000 * value:.2g} ms {PHRASES[arm]}" for arm, value in evidence.seconds.items()]
        finding += f" A step takes {listed(each)}."
    arrived = " A marker is where the median run reaches the target." if any(marks) else ""
    return Figure(
        key="race",
        title=f"Validation loss ({evidence.loss_name})",
        finding=finding,
        note=_note(evidence) + arrived,
        plots=plots,
        table=_table(evidence, {"validation loss": spreads}),
        controls=_scales(loss),
        replay=True,
    )


def _scales(loss: Axis) -> tuple[Control, ...]:
    return (X_SCALE, Y_SCALE) if loss.switch else (X_SCALE,)


def _best_losses(evidence: Evidence, spreads: dict[str, Spread]) -> str:
    """The least median loss of each arm and where it was."""
    parts = []
    for arm, curve in spreads.items():
        at = int(np.argmin(curve.median))
        if math.isfinite(curve.median[at]):
            parts.append(f"{curve.median[at]:.3g} at step {evidence.evaluations[at]} {PHRASES[arm]}")
        else:
            parts.append(f"not finite {PHRASES[arm]}")
    return f"The median validation loss is least at {listed(parts)}."


def curves(evidence: Evidence) -> Figure:
    """Training loss and validation score, against steps or seconds."""
    losses, scores = _spreads(evidence, "train_loss"), _spreads(evidence, "validation_score")
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
                _rules(evidence, "score"),
            ),
        ],
        table=_table(evidence, {"training loss": losses, f"validation {name}": scores}),
        controls=((TIME,) if evidence.seconds else ()) + _scales(loss),
    )


def _score_range(highest: dict[str, float], scores: dict[str, Spread]) -> tuple[float, float] | None:
    """Limits that show the scores above -0.5, since an R squared may start anywhere below."""
    lows = [float(curve.low[np.isfinite(curve.low)].min(initial=1.0)) for curve in scores.values()]
    if min(lows) >= -0.5 or not any(value > -0.5 for value in highest.values()):
        return None
    top = max(value for curve in scores.values() for value in curve.high)
    return -0.5, float(top) + 0.05
