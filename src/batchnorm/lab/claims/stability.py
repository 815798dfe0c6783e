"""Claim: training is more stable; it bears a wider range of learning rates."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np

from batchnorm.lab.claims.claim import Claim, Measured
from batchnorm.lab.claims.judgement import Measurement
from batchnorm.lab.claims.study import Study
from batchnorm.lab.claims.sweep import share, width_pairs, widths
from batchnorm.lab.comparison.measures import middle_half
from batchnorm.lab.training.records import recorded
from batchnorm.lab.training.runs import Run, evaluation_steps
from batchnorm.lab.training.settings import ARMS, Arm, neighboring_rate
from batchnorm.lab.training.stacks import Stack, cut

__all__ = ["CLAIM"]

PHASE = "stability"
BEYOND = 2


def _rates(study: Study) -> list[float]:
    """The learning rates of the search and, unless they were given, two more above."""
    rates = list(study.tried)
    if study.settings.learning_rates is None:
        for _ in range(BEYOND):
            rates.append(neighboring_rate(rates[-1], 1))
    return rates


def _stacks(study: Study) -> list[Stack]:
    settings = replace(study.settings, steps=study.settings.sweep_steps)
    pairs = [(rate, seed) for rate in _rates(study) for seed in study.seeds]
    return [stack for arm in ARMS for stack in cut(PHASE, PHASE, arm, pairs, settings)]


def _design(study: Study) -> str:
    settings = study.settings
    trained = "" if study.threshold is None else f" ({study.threshold:.3g})"
    return (
        f"Every arm is trained with {settings.seeds} seeds at each of {len(_rates(study))} learning rates, "
        f"{settings.sweep_steps} steps each. A run trains where it does not diverge and the mean of its last three "
        f"validation scores is at least half of the way{trained} from a constant guess to the best score of any arm. "
        "Compared seed by seed is how many decades of learning rate train. It does not hold where half a decade "
        "more is excluded."
    )


def _spacing(rates: list[float]) -> float:
    return math.log10(rates[-1] / rates[0]) / (len(rates) - 1) if len(rates) > 1 else 0.0


def _loss_change(study: Study, arm: Arm) -> dict[str, Any]:
    """Change of the mini-batch loss between steps in the confirming runs: median and middle half over seeds."""
    changes = np.array([recorded(run.record.loss_change).mean for run in study.run.runs("confirm", arm)], dtype=float)
    median, low, high = middle_half(np.where(np.isfinite(changes), changes, np.inf)[:, 1:])
    return {
        "steps": evaluation_steps(study.settings.steps)[1:],
        "median": median.tolist(),
        "low": low.tolist(),
        "high": high.tolist(),
    }


def _measure(study: Study) -> Measured:
    rates = _rates(study)
    runs: dict[Arm, list[list[Run]]] = {}
    for arm in ARMS:
        of_arm = study.run.runs(PHASE, arm)
        runs[arm] = [[run for run in of_arm if run.learning_rate == rate] for rate in rates]
    decades = {arm: widths(study, by_rate, _spacing(rates)) for arm, by_rate in runs.items()}
    measurements = []
    for arm in ARMS[1:]:
        reason = study.nothing_learned("none", arm)
        if len(rates) == 1:
            reason = "one learning rate is no range"
        measurements.append(
            Measurement(
                arm,
                "more learning rates train",
                "decades more of learning rate",
                "decades fewer of learning rate",
                "difference",
                width_pairs(decades, arm),
                0.5,
                reason,
            )
        )
    details = {
        "rates": rates,
        "threshold": study.threshold,
        "steps": study.settings.sweep_steps,
        "trains": {arm: [share(study.trains, at) for at in by_rate] for arm, by_rate in runs.items()},
        "diverged": {
            arm: [share(lambda run: run.diverged_at is not None, at) for at in by_rate] for arm, by_rate in runs.items()
        },
        "scores": {arm: [[study.last_score(run) for run in at] for at in by_rate] for arm, by_rate in runs.items()},
        "width": decades,
        "loss_change": {arm: _loss_change(study, arm) for arm in ARMS},
    }
    return Measured(measurements, details)


CLAIM = Claim(
    name="stability",
    title="More stable training",
    question="Does training bear more learning rates, diverge less often, and wander less from step to step?",
    statement="Batch norm widens the range of learning rates that train",
    design=_design,
    measure=_measure,
    stacks=_stacks,
    records=("loss_change",),
)
