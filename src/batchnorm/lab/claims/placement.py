"""Claim: before the nonlinearity, where the paper puts it, batch normalization arrives sooner than after it."""

from __future__ import annotations

from batchnorm.lab.claims.claim import Claim, Measured
from batchnorm.lab.claims.judgement import Measurement
from batchnorm.lab.claims.study import Study
from batchnorm.lab.comparison.measures import ratio_bounds
from batchnorm.lab.comparison.result import test_difference

__all__ = ["CLAIM"]

MARGIN = 1.1


def _design(study: Study) -> str:
    return (
        f"The two placements of the comparison, each at its own best learning rate, {study.settings.seeds} seeds: "
        "steps to the target after the nonlinearity over those before it, seed by seed, and the difference of the test "
        "scores (before less after). It does not hold where a gain of 10% is excluded."
    )


def _measure(study: Study) -> Measured:
    runs = {arm: study.run.runs("confirm", arm) for arm in ("before", "after")}
    arms = study.run.content["result"]["arms"]
    steps = {arm: arms[arm]["steps"] for arm in runs}
    pairs = [
        ratio_bounds(after, before, study.settings.steps)
        for after, before in zip(steps["after"], steps["before"], strict=True)
    ]
    reason = study.nothing_learned("before", "after") if study.counted else study.too_few_rows
    measurement = Measurement(
        "before",
        "sooner than after it",
        "times fewer steps than after it",
        "times more steps than after it",
        "ratio",
        pairs,
        MARGIN,
        reason,
    )
    difference = test_difference(runs["before"], runs["after"], study.dataset, study.settings.seed)
    return Measured([measurement], {"steps": steps, "test_difference": difference})


CLAIM = Claim(
    name="placement",
    title="Before or after the nonlinearity",
    question="Does batch normalization before the nonlinearity reach the target sooner than after it?",
    statement="Batch norm arrives sooner before the nonlinearity than after it",
    design=_design,
    measure=_measure,
)
