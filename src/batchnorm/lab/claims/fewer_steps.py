"""Claim: batch normalization needs fewer steps, and fewer seconds, to reach a score."""

from __future__ import annotations

from batchnorm.lab.claims.claim import Claim, Measured
from batchnorm.lab.claims.measurement import NORMALIZED_ARMS, Effect, Measurement
from batchnorm.lab.comparison.study import Study
from batchnorm.lab.training.settings import Arm

__all__ = ["CLAIM"]

MARGIN = 1.1
STEPS = Effect("fewer steps", "fewer steps", "more steps", "ratio", MARGIN)
SECONDS = Effect("fewer seconds", "fewer seconds", "more seconds", "ratio", MARGIN, family="seconds")


def _design(study: Study) -> str:
    return (
        f"The confirming runs of the comparison: each arm at its own best learning rate, with {study.settings.seeds} "
        f"fresh seeds. The steps to {study.target.rule.split(',')[0]} without batch norm are divided by those with it, "
        "seed by seed. Seconds are the steps times the measured time per step. The claim does not hold where a gain of "
        "10% is excluded."
    )


def _measure(study: Study) -> Measured:
    arms, ratios = study.result.arms, study.result.ratios
    measurements = []
    for arm in NORMALIZED_ARMS:
        measurements.append(Measurement(arm, STEPS, ratios[arm].pairs, _reason(study, arm)))
    for arm in NORMALIZED_ARMS:
        none, some = arms["none"].seconds_per_step, arms[arm].seconds_per_step
        assert none is not None
        assert some is not None
        factor = none / some
        pairs = [(low * factor, high * factor) for low, high in ratios[arm].pairs]
        measurements.append(Measurement(arm, SECONDS, pairs, _reason(study, arm)))
    return Measured(measurements)


def _reason(study: Study, arm: Arm) -> str | None:
    """Return why the ratio of an arm can't be judged; None where it can."""
    return study.nothing_learned("none", arm) if study.result.headline else study.too_few_rows


CLAIM = Claim(
    name="fewer_steps",
    title="Fewer steps, and fewer seconds, to a score",
    question="Does a network with batch normalization reach the same score in fewer gradient steps, and sooner?",
    statement="Batch norm reaches the target sooner",
    design=_design,
    measure=_measure,
)
