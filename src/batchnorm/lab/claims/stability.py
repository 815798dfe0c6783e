"""Claim: training is more stable, and tolerates a wider range of learning rates."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

from batchnorm.lab.claims.claim import Claim, Details, Measured
from batchnorm.lab.claims.measurement import NORMALIZED_ARMS, Effect, Measurement
from batchnorm.lab.claims.sweep import share, width_pairs, widths
from batchnorm.lab.comparison.measures import QuartileBand, quartile_band
from batchnorm.lab.comparison.study import Study
from batchnorm.lab.training.records import recorded
from batchnorm.lab.training.runs import Run, evaluation_steps
from batchnorm.lab.training.settings import ARMS, Arm, neighboring_rate
from batchnorm.lab.training.stacks import Stack, cut

__all__ = ["CLAIM", "LossChange", "StabilityDetails"]

PHASE = "stability"
BEYOND = 2
WIDER_RANGE = Effect(
    "more learning rates train",
    "decades more of learning rate",
    "decades fewer of learning rate",
    "difference",
    margin=0.5,
)


@dataclass(frozen=True)
class LossChange:
    """Mean absolute change of the mini-batch loss from step to step, over the seeds.

    Attributes
    ----------
    steps : list of int
        Steps of the evaluations up to which the change is averaged.
    change : QuartileBand
    """

    steps: list[int]
    change: QuartileBand


@dataclass(frozen=True)
class StabilityDetails(Details):
    """Details of the sweep of learning rates, by arm and rate.

    Attributes
    ----------
    rates : list of float
    threshold : float or None
        The score from which on a run trains.
    steps : int
        Steps of every run.
    trains, diverged : dict of arm to list of float
        Share of the seeds that train, and that diverge, per rate.
    scores : dict of arm to list of list of float
        Score at the end, per rate and seed; NaN where a run diverged.
    width : dict of arm to list of float
        Decades of learning rate that train, per seed.
    loss_change : dict of arm to LossChange
    """

    rates: list[float]
    threshold: float | None
    steps: int
    trains: dict[Arm, list[float]]
    diverged: dict[Arm, list[float]]
    scores: dict[Arm, list[list[float]]]
    width: dict[Arm, list[float]]
    loss_change: dict[Arm, LossChange]


def _rates(study: Study) -> list[float]:
    """Return the learning rates of the search and, unless they were given, two more above them."""
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
        f"for {settings.sweep_steps} steps. A run trains if it does not diverge, and the mean of its last three "
        f"validation scores is at least halfway{trained} from a constant guess to the best score of any arm. The "
        "decades of learning rate over which a seed trains are compared seed by seed. The claim does not hold where a "
        "gain of half a decade is excluded."
    )


def _spacing(rates: list[float]) -> float:
    """Return the mean distance between neighboring learning rates, in decades."""
    return math.log10(rates[-1] / rates[0]) / (len(rates) - 1) if len(rates) > 1 else 0.0


def _loss_change(study: Study, arm: Arm) -> LossChange:
    """Return the change of the mini-batch loss between steps in the confirming runs; infinite where a run diverged."""
    changes = np.array([recorded(run.record.loss_change).mean for run in study.run.runs("confirm", arm)], dtype=float)
    finite = np.where(np.isfinite(changes), changes, np.inf)
    return LossChange(evaluation_steps(study.settings.steps)[1:], quartile_band(finite[:, 1:]))


def _measure(study: Study) -> Measured:
    rates = _rates(study)
    runs: dict[Arm, list[list[Run]]] = {}
    for arm in ARMS:
        of_arm = study.run.runs(PHASE, arm)
        runs[arm] = [[run for run in of_arm if run.learning_rate == rate] for rate in rates]
    decades = {arm: widths(study, by_rate, _spacing(rates)) for arm, by_rate in runs.items()}
    measurements = []
    for arm in NORMALIZED_ARMS:
        reason = study.nothing_learned("none", arm) if len(rates) > 1 else "one learning rate is no range"
        measurements.append(Measurement(arm, WIDER_RANGE, width_pairs(decades, arm), reason))
    details = StabilityDetails(
        rates=rates,
        threshold=study.threshold,
        steps=study.settings.sweep_steps,
        trains={arm: [share(study.trains, at) for at in by_rate] for arm, by_rate in runs.items()},
        diverged={
            arm: [share(lambda run: run.diverged_at is not None, at) for at in by_rate] for arm, by_rate in runs.items()
        },
        scores={arm: [[study.last_score(run) for run in at] for at in by_rate] for arm, by_rate in runs.items()},
        width=decades,
        loss_change={arm: _loss_change(study, arm) for arm in ARMS},
    )
    return Measured(measurements, details)


CLAIM = Claim(
    name="stability",
    title="More stable training",
    question="Does training tolerate more learning rates, diverge less often, and fluctuate less from step to step?",
    statement="Batch norm widens the range of learning rates that train",
    design=_design,
    measure=_measure,
    stacks=_stacks,
    records=("loss_change",),
    details=StabilityDetails,
)
