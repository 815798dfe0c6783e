"""Claim: batch normalization needs fewer steps, and fewer seconds, to a score."""

from __future__ import annotations

from batchnorm.lab.claims.claim import Claim, Measured
from batchnorm.lab.claims.judgement import Measurement
from batchnorm.lab.claims.study import Study
from batchnorm.lab.training.settings import ARMS

__all__ = ["CLAIM"]

MARGIN = 1.1


def _design(study: Study) -> str:
    return (
        f"The comparison itself: each arm at its own best learning rate, {study.settings.seeds} fresh seeds, steps to "
        f"{study.target.rule.split(',')[0]}, without batch norm over with it, seed by seed. Seconds are the steps "
        "times the measured time of a step. It does not hold where a gain of 10% is excluded."
    )


def _measure(study: Study) -> Measured:
    measurements = []
    for arm in ARMS[1:]:
        ratio = study.run.content["result"]["ratios"][arm]
        pairs = [(low, high) for low, high in ratio["pairs"]]
        reason = study.nothing_learned("none", arm) if study.counted else study.too_few_rows
        measurements.append(
            Measurement(arm, "fewer steps", "times fewer steps", "times more steps", "ratio", pairs, MARGIN, reason)
        )
    for arm in ARMS[1:]:
        arms, ratio = (study.run.content["result"][key] for key in ("arms", "ratios"))
        factor = arms["none"]["seconds_a_step"] / arms[arm]["seconds_a_step"]
        pairs = [(low * factor, high * factor) for low, high in ratio[arm]["pairs"]]
        reason = study.nothing_learned("none", arm) if study.counted else study.too_few_rows
        measurements.append(
            Measurement(
                arm,
                "fewer seconds",
                "times fewer seconds",
                "times more seconds",
                "ratio",
                pairs,
                MARGIN,
                reason,
                family="seconds",
            )
        )
    return Measured(measurements)


CLAIM = Claim(
    name="fewer_steps",
    title="Fewer steps, and fewer seconds, to a score",
    question="Does a network with batch normalization reach the same score in fewer gradient steps, and sooner?",
    statement="Batch norm reaches the target sooner",
    design=_design,
    measure=_measure,
)
