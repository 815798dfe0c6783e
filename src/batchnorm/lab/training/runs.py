"""What a training run leaves, and when it arrived at a target."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

__all__ = ["CONSECUTIVE", "Measure", "Run", "Target", "evaluation_steps", "median_steps", "rounded", "steps_to"]

CONSECUTIVE = 3
Measure = Literal["score", "loss"]


@dataclass
class Run:
    """What one run left: a number for each evaluation, NaN from the one at which it had diverged."""

    arm: str
    learning_rate: float
    seed: int
    diverged_at: int | None = None
    train_loss: list[float] = field(default_factory=list)
    validation_loss: list[float] = field(default_factory=list)
    validation_score: list[float] = field(default_factory=list)
    test: dict[str, Any] | None = None
    trace: list[list[list[float]]] | None = None
    record: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Target:
    """What a run must reach on the validation rows: a score at or above a value, or a loss at or below it."""

    measure: Measure
    value: float
    rule: str

    def reached(self, run: Run) -> NDArray[np.bool_]:
        """Whether each evaluation of a run is good enough; NaN never is."""
        if self.measure == "score":
            return np.asarray(run.validation_score) >= self.value
        return np.asarray(run.validation_loss) <= self.value


def rounded(value: float) -> float:
    """Six digits: what a float32 sum is good for, and what run.json needs to hold."""
    return float(f"{value:.6g}")


def evaluation_steps(steps: int) -> list[int]:
    """Evaluate at every step to 20, then every 5% more, and at the last.

    >>> evaluation_steps(25)
    [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 23, 25]
    """
    chosen = list(range(1, min(20, steps) + 1))
    while chosen[-1] < steps:
        chosen.append(min(steps, math.ceil(chosen[-1] * 1.05)))
    return chosen


def steps_to(run: Run, target: Target, evaluations: Sequence[int]) -> int | None:
    """Step of the first of 3 consecutive evaluations that reach the target; None where there is none.

    A run that diverged, at whatever step, never arrives.
    """
    if run.diverged_at is not None:
        return None
    good = target.reached(run)
    for i in range(len(good) - CONSECUTIVE + 1):
        if good[i : i + CONSECUTIVE].all():
            return evaluations[i]
    return None


def median_steps(steps: Sequence[int | None]) -> float | None:
    """Median of the steps where more than half of the runs arrived, else None (it is above S)."""
    arrived = [step for step in steps if step is not None]
    if 2 * len(arrived) <= len(steps):
        return None
    return float(np.median([math.inf if step is None else step for step in steps]))
