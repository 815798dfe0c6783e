"""Claim: batch normalization regularizes: at equal training loss the test score is closer to the training score."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from batchnorm.lab.claims.claim import Claim, Details, Measured
from batchnorm.lab.claims.measurement import NORMALIZED_ARMS, Effect, Measurement
from batchnorm.lab.comparison.measures import Bounds, QuartileBand
from batchnorm.lab.comparison.study import Study
from batchnorm.lab.training.records import recorded
from batchnorm.lab.training.runs import Run
from batchnorm.lab.training.settings import ARMS, Arm

__all__ = ["CLAIM", "Noise", "RegularizationDetails"]

MARGIN = 0.005
LEVELS = 24


@dataclass(frozen=True)
class Noise:
    """Noise of a mini-batch's statistics by batch size, in standard deviations of all rows.

    Attributes
    ----------
    batch_sizes : list of int
    mean, sd : dict of arm to list of float
        Noise of the mean and of the standard deviation, in the first run of each arm.
    theory : list of float
        Noise of the mean of independent rows, ``1 / sqrt(batch size)``.
    """

    batch_sizes: list[int]
    mean: dict[Arm, list[float]]
    sd: dict[Arm, list[float]]
    theory: list[float]


@dataclass(frozen=True)
class RegularizationDetails(Details):
    """Details of the gap between training and test score.

    Attributes
    ----------
    noise : Noise
    losses : list of float
        Training losses at which the gap is taken; empty where no run trains.
    gaps : dict of arm to QuartileBand
        Gap at each of the losses, NaN where at most half of the runs reach that loss.
    """

    noise: Noise
    losses: list[float] = field(default_factory=list)
    gaps: dict[Arm, QuartileBand] = field(default_factory=dict)


def _design(study: Study) -> str:
    return (
        f"In the {study.settings.seeds} confirming runs of each arm, the loss and score on the training rows and the "
        "score on the test rows are measured at every evaluation, with the running statistics. Each pair of runs is "
        "compared at the least training loss that both reach, each run where it first reached that loss. The gap is "
        "the training score less the test score, and the gain is the gap without batch norm less the gap with it. The "
        f"claim does not hold where a gain of {MARGIN:g} is excluded. The noise is that of the mean and the standard "
        "deviation of the inputs of the last hidden nonlinearity at the end of training, over mini-batches drawn from "
        "the training rows."
    )


def _gap(run: Run, level: float) -> float:
    """Return training less test score where the training loss first is at a level or below; NaN where it never is."""
    record = recorded(run.record.gap)
    below = np.flatnonzero(np.array(record.train_loss, dtype=float) <= level)
    return float(record.train_score[below[0]] - record.test_score[below[0]]) if len(below) else math.nan


def _least(run: Run) -> float:
    """Return the least training loss of a run; infinite where none is finite."""
    losses = np.array(recorded(run.record.gap).train_loss, dtype=float)
    return float(losses[np.isfinite(losses)].min(initial=math.inf))


def _gain(none: Run, arm: Run) -> Bounds:
    """Return how much smaller the gap of a pair is with batch norm; unbounded where one of them never trained."""
    level = max(_least(none), _least(arm))
    gain = _gap(none, level) - _gap(arm, level) if math.isfinite(level) else math.nan
    return (-math.inf, math.inf) if math.isnan(gain) else (gain, gain)


def _curve(runs: list[Run], levels: NDArray[np.float64]) -> QuartileBand:
    """Return the gap at each level of the training loss, NaN where at most half of the runs reach that level."""
    curve = QuartileBand([], [], [])
    for level in levels:
        gaps = np.array([_gap(run, level) for run in runs])
        known = gaps[np.isfinite(gaps)]
        enough = 2 * len(known) > len(runs)
        low, median, high = np.quantile(known, (0.25, 0.5, 0.75)) if enough else (math.nan,) * 3
        curve.median.append(float(median))
        curve.low.append(float(low))
        curve.high.append(float(high))
    return curve


def _noise(runs: dict[Arm, list[Run]]) -> Noise:
    """Return the noise of the statistics in the first run of each arm."""
    noise = {arm: recorded(recorded(of_arm[0].record.gap).noise) for arm, of_arm in runs.items()}
    sizes = noise["none"].batch_sizes
    return Noise(
        batch_sizes=sizes,
        mean={arm: of_arm.mean for arm, of_arm in noise.items()},
        sd={arm: of_arm.sd for arm, of_arm in noise.items()},
        theory=[1 / math.sqrt(size) for size in sizes],
    )


def _measure(study: Study) -> Measured:
    runs = {arm: study.run.runs("confirm", arm) for arm in ARMS}
    first = max(float(recorded(run.record.gap).train_loss[0]) for run in runs["none"])
    least = min(_least(run) for of_arm in runs.values() for run in of_arm)
    details = RegularizationDetails(_noise(runs))
    if math.isfinite(first) and 0 < least < first:
        levels = np.geomspace(first, least, LEVELS)
        gaps = {arm: _curve(of_arm, levels) for arm, of_arm in runs.items()}
        details = RegularizationDetails(_noise(runs), levels.tolist(), gaps)
    unit = "of R2" if study.dataset.task == "regression" else "of accuracy"
    effect = Effect("a smaller gap", f"{unit} less gap", f"{unit} more gap", "difference", MARGIN)
    measurements = []
    for arm in NORMALIZED_ARMS:
        pairs = [_gain(none, some) for none, some in zip(runs["none"], runs[arm], strict=True)]
        measurements.append(Measurement(arm, effect, pairs, study.nothing_learned("none", arm)))
    return Measured(measurements, details)


CLAIM = Claim(
    name="regularization",
    title="Regularization",
    question="At equal training loss, is the test score closer to the training score?",
    statement="Batch norm narrows the gap between training and test score",
    design=_design,
    measure=_measure,
    records=("gap",),
    details=RegularizationDetails,
)
