"""Test scores: the errors that the runs recorded, and the bootstrapped difference between two arms."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from batchnorm.lab.comparison.measures import Bounds
from batchnorm.lab.data.dataset import Dataset
from batchnorm.lab.training.runs import Run

__all__ = ["Difference", "paired_difference", "test_difference", "test_errors"]


@dataclass(frozen=True)
class Difference:
    """Difference of two mean test scores.

    Attributes
    ----------
    estimate : float
    interval : (float, float)
        The 95% interval, from a bootstrap over test rows and seeds.
    seeds : int
        Number of pairs of runs.
    """

    estimate: float
    interval: Bounds
    seeds: int


def test_errors(runs: Sequence[Run], dataset: Dataset) -> NDArray[np.float64]:
    """Return the errors (seeds, test rows) that the runs recorded."""
    rows = len(dataset.parts["test"])
    return np.stack([run.test.row_errors(dataset.task, rows) for run in runs if run.test is not None])


def test_difference(arm: Sequence[Run], baseline: Sequence[Run], dataset: Dataset, seed: int) -> Difference | None:
    """Return the difference of the test scores over the pairs in which neither run diverged."""
    pairs = [(a, b) for a, b in zip(arm, baseline, strict=True) if a.diverged_at is None and b.diverged_at is None]
    if not pairs:
        return None
    squared_deviation = None
    if dataset.task == "regression":
        y = dataset.y[dataset.parts["test"]]
        squared_deviation = (y - y.mean()) ** 2
    errors, baseline_errors = (test_errors(runs, dataset) for runs in zip(*pairs, strict=True))
    return paired_difference(errors, baseline_errors, squared_deviation, seed)


def paired_difference(
    arm: NDArray[np.float64],
    baseline: NDArray[np.float64],
    squared_deviation: NDArray[np.float64] | None,
    seed: int,
) -> Difference:
    """Return the difference of the mean test score, with its 95% interval by a bootstrap over test rows and seeds.

    ``arm`` and ``baseline`` are paired errors (seeds, rows). ``squared_deviation`` is the squared distance of each
    row's target from the mean of the test targets, which turns squared errors into R squared (None for accuracy).
    """
    seeds, rows = arm.shape
    gain = baseline - arm

    def difference(by_seed: NDArray[np.float64], by_row: NDArray[np.float64]) -> NDArray[np.float64]:
        per_row = (by_seed @ gain) / seeds
        divisor = np.full(len(by_row), float(rows)) if squared_deviation is None else by_row @ squared_deviation
        return np.asarray((per_row * by_row).sum(1) / np.where(divisor > 0, divisor, np.nan))

    generator = np.random.default_rng(seed)
    drawn = [
        difference(
            generator.multinomial(seeds, np.full(seeds, 1 / seeds), 100).astype(float),
            generator.multinomial(rows, np.full(rows, 1 / rows), 100).astype(float),
        )
        for _ in range(20)
    ]
    low, high = np.nanpercentile(np.concatenate(drawn), [2.5, 97.5])
    estimate = difference(np.ones((1, seeds)), np.ones((1, rows)))[0]
    return Difference(float(estimate), (float(low), float(high)), seeds)
