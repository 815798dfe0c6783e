"""Claim: training depends less on the initial weights."""

from __future__ import annotations

from dataclasses import dataclass, replace

from batchnorm.lab.claims.claim import Claim, Details, Measured
from batchnorm.lab.claims.measurement import NORMALIZED_ARMS, Effect, Measurement
from batchnorm.lab.claims.sweep import share, width_pairs, widths
from batchnorm.lab.comparison.study import Study
from batchnorm.lab.training.runs import Target, evaluation_steps, steps_to
from batchnorm.lab.training.settings import ARMS, Arm
from batchnorm.lab.training.stacks import Stack, cut

__all__ = ["CLAIM", "SCALES", "InitialWeightsDetails"]

SCALES = (0.001, 0.01, 0.1, 1.0, 10.0, 100.0)
WIDER_RANGE = Effect(
    "more initial weights train",
    "decades more of initial weights",
    "decades fewer of initial weights",
    "difference",
    margin=1.0,
)


@dataclass(frozen=True)
class InitialWeightsDetails(Details):
    """Details of the sweep of initial weights, by arm and scale.

    Attributes
    ----------
    scales : list of float
        Factors of the initial weights.
    threshold : float or None
        The score from which on a run trains.
    steps : int
        Steps of every run.
    trains : dict of arm to list of float
        Share of the seeds that train, per scale.
    scores : dict of arm to list of list of float
        Score at the end, per scale and seed.
    width : dict of arm to list of float
        Decades of initial weights that train, per seed.
    arrivals : dict of arm to list of list of int or None
        Steps to the threshold, per scale and seed; empty where there is no threshold.
    """

    scales: list[float]
    threshold: float | None
    steps: int
    trains: dict[Arm, list[float]]
    scores: dict[Arm, list[list[float]]]
    width: dict[Arm, list[float]]
    arrivals: dict[Arm, list[list[int | None]]]


def _phase(scale: float) -> str:
    return f"initial scale x {scale:g}"


def _stacks(study: Study) -> list[Stack]:
    settings = study.settings
    return [
        stack
        for scale in SCALES
        for arm in ARMS
        for stack in cut(
            _phase(scale),
            _phase(scale),
            arm,
            [(study.chosen[arm], seed) for seed in study.seeds],
            replace(settings, steps=settings.sweep_steps, init_scale=settings.init_scale * scale),
        )
    ]


def _design(study: Study) -> str:
    settings = study.settings
    trained = "" if study.threshold is None else f" ({study.threshold:.3g})"
    return (
        f"Every arm is trained at its own learning rate from initial weights multiplied by {len(SCALES)} factors, "
        f"{SCALES[0]:g} to {SCALES[-1]:g}, with {settings.seeds} seeds each, for {settings.sweep_steps} steps. A run "
        f"trains if the mean of its last three validation scores is at least halfway{trained} from a constant guess to "
        "the best score of any arm. The decades of initial weights over which a seed trains are compared seed by seed. "
        "The claim does not hold where a gain of one decade is excluded."
    )


def _measure(study: Study) -> Measured:
    runs = {arm: [study.run.runs(_phase(scale), arm) for scale in SCALES] for arm in ARMS}
    decades = {arm: widths(study, by_scale, 1.0) for arm, by_scale in runs.items()}
    evaluations = evaluation_steps(study.settings.sweep_steps)
    arrivals: dict[Arm, list[list[int | None]]] = {}
    if study.threshold is not None:
        target = Target("score", study.threshold, "")
        arrivals = {
            arm: [[steps_to(run, target, evaluations) for run in at] for at in by_scale]
            for arm, by_scale in runs.items()
        }
    details = InitialWeightsDetails(
        scales=list(SCALES),
        threshold=study.threshold,
        steps=study.settings.sweep_steps,
        trains={arm: [share(study.trains, at) for at in by_scale] for arm, by_scale in runs.items()},
        scores={arm: [[study.last_score(run) for run in at] for at in by_scale] for arm, by_scale in runs.items()},
        width=decades,
        arrivals=arrivals,
    )
    measurements = [
        Measurement(arm, WIDER_RANGE, width_pairs(decades, arm), study.nothing_learned("none", arm))
        for arm in NORMALIZED_ARMS
    ]
    return Measured(measurements, details)


CLAIM = Claim(
    name="initial_weights",
    title="Less dependence on the initial weights",
    question="Does the network train from initial weights that are far too small or far too large?",
    statement="Batch norm widens the range of initial weights that train",
    design=_design,
    measure=_measure,
    stacks=_stacks,
    details=InitialWeightsDetails,
)
