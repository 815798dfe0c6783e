"""Training runs, and the step at which a run reaches a target."""

from __future__ import annotations

import base64
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from batchnorm.lab.data.dataset import Task
from batchnorm.lab.training.records import Records

__all__ = [
    "CONSECUTIVE",
    "Measure",
    "Run",
    "Target",
    "TestResult",
    "evaluation_steps",
    "median_steps",
    "rounded",
    "steps_to",
]

CONSECUTIVE = 3
Measure = Literal["score", "loss"]


@dataclass(frozen=True)
class TestResult:
    """Result on the test rows of the network that had the best validation score.

    Attributes
    ----------
    step : int
        Step after which the network was evaluated.
    score : float
        Accuracy, or R squared; NaN where the run diverged.
    errors : str
        Error of each test row in base64: one bit per row for a class, one little-endian float32 per row for a number.
    """

    step: int
    score: float
    errors: str

    @classmethod
    def of(cls, step: int, score: float, errors: NDArray[np.floating[Any]], task: Task) -> TestResult:
        """Make a result from the errors of the test rows."""
        packed = np.packbits(errors > 0) if task == "classification" else errors.astype("<f4")
        return cls(step, score, base64.b64encode(packed.tobytes()).decode())

    def row_errors(self, task: Task, rows: int) -> NDArray[np.float64]:
        """Return the error of each test row: 1 for a wrong class and 0 for the right one, or the squared error."""
        decoded = base64.b64decode(self.errors)
        if task == "classification":
            return np.unpackbits(np.frombuffer(decoded, np.uint8), count=rows).astype(np.float64)
        return np.frombuffer(decoded, "<f4").astype(np.float64)


@dataclass
class Run:
    """One training run.

    Attributes
    ----------
    arm, learning_rate, seed
        The design of the run.
    diverged_at : int or None
        First step with a loss that is not finite.
    train_loss, validation_loss, validation_score : list of float
        One value per evaluation; NaN once the run has diverged.
    test : TestResult or None
    trace : list, shape (evaluations, units, 3), or None
        15th, 50th and 85th percentile of the inputs of the last hidden nonlinearity.
    record : Records
    """

    arm: str
    learning_rate: float
    seed: int
    diverged_at: int | None = None
    train_loss: list[float] = field(default_factory=list)
    validation_loss: list[float] = field(default_factory=list)
    validation_score: list[float] = field(default_factory=list)
    test: TestResult | None = None
    trace: list[list[list[float]]] | None = None
    record: Records = field(default_factory=Records)


@dataclass(frozen=True)
class Target:
    """The goal of a run on the validation rows: a score at or above a value, or a loss at or below it."""

    measure: Measure
    value: float
    rule: str

    def reached(self, run: Run) -> NDArray[np.bool_]:
        """Return whether each evaluation of a run reaches the target; NaN never does."""
        if self.measure == "score":
            return np.asarray(run.validation_score) >= self.value
        return np.asarray(run.validation_loss) <= self.value


def rounded(value: float) -> float:
    """Round to six significant digits, the accuracy of a float32 sum, which keeps run.json small."""
    return float(f"{value:.6g}")


def evaluation_steps(steps: int) -> list[int]:
    """Return the steps at which a run is evaluated: each of the first 20, then every 5% more, and the last.

    >>> evaluation_steps(25)
    [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 23, 25]
    """
    chosen = list(range(1, min(20, steps) + 1))
    while chosen[-1] < steps:
        chosen.append(min(steps, math.ceil(chosen[-1] * 1.05)))
    return chosen


def steps_to(run: Run, target: Target, evaluations: Sequence[int]) -> int | None:
    """Return the step of the first of 3 consecutive evaluations that reach the target, or None.

    A run that diverged at any step never reaches it.
    """
    if run.diverged_at is not None:
        return None
    good = target.reached(run)
    for i in range(len(good) - CONSECUTIVE + 1):
        if good[i : i + CONSECUTIVE].all():
            return evaluations[i]
    return None


def median_steps(steps: Sequence[int | None]) -> float | None:
    """Return the median of the steps, or None where at most half of the runs reached the target."""
    known = [step for step in steps if step is not None]
    if 2 * len(known) <= len(steps):
        return None
    return float(np.median([math.inf if step is None else step for step in steps]))
