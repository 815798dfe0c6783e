"""Claim: batch normalization reaches the target sooner before the nonlinearity, as in the paper, than after it."""

from __future__ import annotations

from dataclasses import dataclass

from batchnorm.lab.claims.claim import Claim, Details, Measured
from batchnorm.lab.claims.measurement import Effect, Measurement
from batchnorm.lab.comparison.measures import ratio_bounds
from batchnorm.lab.comparison.scores import Difference, test_difference
from batchnorm.lab.comparison.study import Study
from batchnorm.lab.training.settings import ARMS, Arm

__all__ = ["CLAIM", "PlacementDetails"]

SOONER = Effect(
    "sooner than after it",
    "fewer steps than after it",
    "more steps than after it",
    "ratio",
    margin=1.1,
)


@dataclass(frozen=True)
class PlacementDetails(Details):
    """Details of the two placements.

    Attributes
    ----------
    steps : dict of arm to list of int or None
        Steps to the target per seed, for "before" and "after".
    test_difference : Difference or None
        Test score before less that after the nonlinearity.
    """

    steps: dict[Arm, list[int | None]]
    test_difference: Difference | None


def _design(study: Study) -> str:
    return (
        f"The two placements of the comparison, each at its own best learning rate, with {study.settings.seeds} seeds. "
        "The steps to the target after the nonlinearity are divided by those before it, seed by seed. The difference "
        "of the test scores is before less after. The claim does not hold where a gain of 10% is excluded."
    )


def _measure(study: Study) -> Measured:
    steps: dict[Arm, list[int | None]] = {arm: study.result.arms[arm].steps for arm in ARMS[1:]}
    pairs = [
        ratio_bounds(after, before, study.settings.steps)
        for after, before in zip(steps["after"], steps["before"], strict=True)
    ]
    reason = study.nothing_learned("before", "after") if study.result.headline else study.too_few_rows
    before, after = (study.run.runs("confirm", arm) for arm in ("before", "after"))
    difference = test_difference(before, after, study.dataset, study.settings.seed)
    return Measured([Measurement("before", SOONER, pairs, reason)], PlacementDetails(steps, difference))


CLAIM = Claim(
    name="placement",
    title="Before or after the nonlinearity",
    question="Does batch normalization before the nonlinearity reach the target sooner than after it?",
    statement="Batch norm reaches the target sooner before the nonlinearity than after it",
    design=_design,
    measure=_measure,
    details=PlacementDetails,
)
