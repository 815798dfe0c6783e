"""Claim: batch normalization regularises; the gap to the test score is smaller at equal training loss."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from batchnorm.lab.claims.claim import Claim, Measured
from batchnorm.lab.claims.judgement import Measurement
from batchnorm.lab.claims.study import Study
from batchnorm.lab.comparison.measures import Bounds
from batchnorm.lab.training.records import recorded
from batchnorm.lab.training.runs import Run
from batchnorm.lab.training.settings import ARMS, Arm

__all__ = ["CLAIM"]

MARGIN = 0.005
LEVELS = 24


def _design(study: Study) -> str:
    return (
        f"In the {study.settings.seeds} runs that confirm each arm's learning rate, loss and score on the training "
        "rows and score on the test rows are taken at every evaluation, with the statistics that inference uses. Each "
        "pair of runs is compared at the least training loss that both reach, each where it first got there: the gap "
        "is the training score less the test score, and the gain the gap without batch norm less the gap with it. It "
        f"does not hold where a gain of {MARGIN:g} is excluded. The noise of a mini-batch's mean and deviation is that "
        "of what enters the last hidden nonlinearity at the end, over mini-batches drawn from the training rows."
    )


def _gap(run: Run, level: float) -> float:
    """Training score less test score where the training loss first is at a level or below; NaN if never."""
    record = recorded(run.record.gap)
    below = np.flatnonzero(np.array(record.train_loss, dtype=float) <= level)
    return float(record.train_score[below[0]] - record.test_score[below[0]]) if len(below) else math.nan


def _least(run: Run) -> float:
    losses = np.array(recorded(run.record.gap).train_loss, dtype=float)
    return float(losses[np.isfinite(losses)].min(initial=math.inf))


def _gain(none: Run, arm: Run) -> Bounds:
    """How much smaller the gap of a pair is with batch norm; unknown where one of them never trained."""
    level = max(_least(none), _least(arm))
    gain = _gap(none, level) - _gap(arm, level) if math.isfinite(level) else math.nan
    return (-math.inf, math.inf) if math.isnan(gain) else (gain, gain)


def _curve(runs: list[Run], levels: NDArray[np.float64]) -> dict[str, Any]:
    """Median gap and its middle half at each level of the training loss, where more than half of the runs got to it."""
    curve: dict[str, list[float]] = {"median": [], "low": [], "high": []}
    for level in levels:
        gaps = np.array([_gap(run, level) for run in runs])
        known = gaps[np.isfinite(gaps)]
        enough = 2 * len(known) > len(runs)
        low, median, high = np.quantile(known, (0.25, 0.5, 0.75)) if enough else (math.nan,) * 3
        for name, value in (("median", median), ("low", low), ("high", high)):
            curve[name].append(float(value))
    return curve


def _noise(runs: dict[Arm, list[Run]]) -> dict[str, Any]:
    """Noise of the statistics by batch size, of the first run of each arm, and 1 / sqrt(m) beside it."""
    noise = {arm: recorded(recorded(of_arm[0].record.gap).noise) for arm, of_arm in runs.items()}
    sizes = noise["none"].batch_sizes
    return {
        "batch_sizes": sizes,
        "mean": {arm: of_arm.mean for arm, of_arm in noise.items()},
        "sd": {arm: of_arm.sd for arm, of_arm in noise.items()},
        "theory": [1 / math.sqrt(size) for size in sizes],
    }


def _measure(study: Study) -> Measured:
    runs = {arm: study.run.runs("confirm", arm) for arm in ARMS}
    first = max(float(recorded(run.record.gap).train_loss[0]) for run in runs["none"])
    least = min(_least(run) for of_arm in runs.values() for run in of_arm)
    details: dict[str, Any] = {"noise": _noise(runs)}
    if math.isfinite(first) and 0 < least < first:
        levels = np.geomspace(first, least, LEVELS)
        details["losses"] = levels.tolist()
        details["gaps"] = {arm: _curve(of_arm, levels) for arm, of_arm in runs.items()}
    unit = "of R2" if study.dataset.task == "regression" else "of accuracy"
    measurements = [
        Measurement(
            arm,
            "a smaller gap",
            f"{unit} less gap",
            f"{unit} more gap",
            "difference",
            [_gain(none, some) for none, some in zip(runs["none"], runs[arm], strict=True)],
            MARGIN,
            study.nothing_learned("none", arm),
        )
        for arm in ARMS[1:]
    ]
    return Measured(measurements, details)


CLAIM = Claim(
    name="regularisation",
    title="Regularisation",
    question="At equal training loss, is the test score closer to the training score?",
    statement="Batch norm narrows the gap between training and test score",
    design=_design,
    measure=_measure,
    records=("gap",),
)
