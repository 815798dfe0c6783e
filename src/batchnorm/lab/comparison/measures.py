"""Measures of a comparison: the target, the choice of a learning rate, ratios of steps and their intervals.

A run that does not reach the target within its S steps took "more than S". It is neither dropped nor given a number:
quantities that depend on such runs are (lower, upper) bounds, which are equal where the quantity is known.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from batchnorm.lab.training.runs import Measure, Run, Target, median_steps, steps_to

__all__ = [
    "Bounds",
    "PairSummary",
    "QuartileBand",
    "RateSummary",
    "best_rate",
    "choose_rate",
    "choose_target",
    "middle_half",
    "order_statistic",
    "quartile_band",
    "ratio_bounds",
    "summarize_pairs",
    "summarize_rates",
]

SHARE_OF_BEST = 0.99
CONFIDENCE = 0.95
MIN_VALIDATION_ROWS = 100
Bounds = tuple[float, float]


def _median(values: Sequence[float]) -> float:
    return float(np.median(values)) if len(values) else math.nan


def _best(run: Run, measure: Measure) -> float:
    """Return the best value of a run, or the worst value possible where it diverged."""
    worst = -math.inf if measure == "score" else math.inf
    if run.diverged_at is not None:
        return worst
    return max(run.validation_score) if measure == "score" else min(run.validation_loss)


def best_rate(runs: Sequence[Run], measure: Measure) -> tuple[float, float]:
    """Return the learning rate with the best median over seeds of the best validation value, and that median."""
    sign = 1 if measure == "score" else -1
    medians = {
        rate: _median([_best(run, measure) for run in runs if run.learning_rate == rate])
        for rate in sorted({run.learning_rate for run in runs})
    }
    rate = max(medians, key=lambda rate: sign * medians[rate])
    return rate, medians[rate]


def choose_target(
    baseline: Sequence[Run], *, task: str, validation_rows: int, constant_loss: float, target_score: float | None
) -> Target:
    """Return the target that the search of the arm without batch normalization sets.

    The target is 0.99 of the median over seeds of the best validation score at the best learning rate, rounded down
    to a multiple of 1 / (validation rows). On fewer than 100 validation rows, or where that is not positive, it is a
    validation loss instead: 0.99 of the best reduction below the loss of a constant guess, or within 1% of the best
    loss where that is no reduction. Where every run diverged, no run can reach the target. ``target_score`` overrides
    all of this.
    """
    name = "R2" if task == "regression" else "accuracy"
    if target_score is not None:
        return Target("score", target_score, f"a validation {name} of {target_score:g}, as asked")
    _, score = best_rate(baseline, "score")
    value = math.floor(SHARE_OF_BEST * score * validation_rows + 1e-9) / validation_rows if score > 0 else 0.0
    if value > 0 and validation_rows >= MIN_VALIDATION_ROWS:
        return Target("score", value, f"a validation {name} of {value:.4g}, 0.99 of the best without batch norm")
    _, loss = best_rate(baseline, "loss")
    if not math.isfinite(loss):
        return Target("loss", -math.inf, "none: without batch norm every run diverged")
    if loss < constant_loss:
        value = constant_loss - SHARE_OF_BEST * (constant_loss - loss)
        return Target("loss", value, f"a validation loss of {value:.4g}, 0.99 of the best reduction without batch norm")
    value = loss / SHARE_OF_BEST
    return Target("loss", value, f"a validation loss of {value:.4g}, within 1% of the best without batch norm")


@dataclass(frozen=True)
class RateSummary:
    """Summary of the search seeds of an arm at one learning rate.

    Attributes
    ----------
    learning_rate : float
    seeds, reached, diverged : int
        Number of runs, of those that reach the target, and of those that diverged.
    median_steps : float or None
        Median steps to the target; None where at most half of the runs reach it.
    best_score, best_loss : float
        Median over the runs of the best validation score and of the least validation loss.
    """

    learning_rate: float
    seeds: int
    reached: int
    diverged: int
    median_steps: float | None
    best_score: float
    best_loss: float


def summarize_rates(runs: Sequence[Run], target: Target, evaluations: Sequence[int]) -> list[RateSummary]:
    """Return a summary per learning rate of an arm, in ascending order."""
    summaries = []
    for rate in sorted({run.learning_rate for run in runs}):
        here = [run for run in runs if run.learning_rate == rate]
        steps = [steps_to(run, target, evaluations) for run in here]
        summaries.append(
            RateSummary(
                learning_rate=rate,
                seeds=len(here),
                reached=sum(step is not None for step in steps),
                diverged=sum(run.diverged_at is not None for run in here),
                median_steps=median_steps(steps),
                best_score=_median([_best(run, "score") for run in here]),
                best_loss=_median([_best(run, "loss") for run in here]),
            )
        )
    return summaries


def choose_rate(summaries: Sequence[RateSummary]) -> float:
    """Return the rate at which most seeds reach the target; ties go to fewer median steps, then to less loss."""

    def order(summary: RateSummary) -> tuple[float, ...]:
        steps = math.inf if summary.median_steps is None else summary.median_steps
        return (-summary.reached, steps, summary.best_loss)

    return min(summaries, key=order).learning_rate


def ratio_bounds(baseline: int | None, arm: int | None, steps: int) -> Bounds:
    """Return bounds of ``baseline / arm``, where a number of steps that is None is above ``steps``."""
    if baseline is not None and arm is not None:
        return baseline / arm, baseline / arm
    lower = 0.0 if arm is None else steps / arm
    upper = math.inf if baseline is None else baseline / steps
    return lower, upper


def middle_half(values: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Return the median over the first axis, and the order statistics at or just outside its quartiles."""
    ordered = np.sort(values, axis=0)
    last = len(ordered) - 1
    return np.median(ordered, axis=0), ordered[math.floor(last / 4)], ordered[math.ceil(last * 3 / 4)]


@dataclass(frozen=True)
class QuartileBand:
    """A curve: the median over runs and the ends of at least their middle half."""

    median: list[float]
    low: list[float]
    high: list[float]


def quartile_band(values: NDArray[np.float64]) -> QuartileBand:
    """Return the curve of values (runs, points)."""
    return QuartileBand(*(curve.tolist() for curve in middle_half(values)))


def order_statistic(count: int) -> tuple[int, float]:
    """Return the k for which order statistics k and n + 1 - k bound the median, and the confidence that they do.

    The confidence is at least 95%, unless even the extremes (k = 1) fall short of it. It is exact for independent
    pairs (the sign test).

    >>> order_statistic(10)
    (2, 0.978515625)
    """

    def coverage(k: int) -> float:
        return 1.0 - 2.0 * sum(math.comb(count, i) for i in range(k)) / 2.0**count

    k = max((k for k in range(1, count // 2 + 1) if coverage(k) >= CONFIDENCE), default=1)
    return k, max(coverage(k), 0.0)


@dataclass(frozen=True)
class PairSummary:
    """Paired amounts, each as (lower, upper) bounds, with their median and its interval.

    Attributes
    ----------
    pairs : list of (float, float)
    median, interval : (float, float)
        Bounds of the median, and the interval that holds the true median with probability ``confidence``.
    confidence : float
    at_least, at_most, unknown : int
        Number of pairs that are bounded from below alone, from above alone, and not at all.
    """

    pairs: list[Bounds]
    median: Bounds
    interval: Bounds
    confidence: float
    at_least: int
    at_most: int
    unknown: int


def summarize_pairs(pairs: Sequence[Bounds]) -> PairSummary:
    """Return the median of paired amounts and its interval, with the counts of the pairs that are only bounded."""
    count = len(pairs)
    k, confidence = order_statistic(count)
    lower = np.sort([pair[0] for pair in pairs])
    upper = np.sort([pair[1] for pair in pairs])
    with np.errstate(invalid="ignore"):
        middle = (float(np.median(lower)), float(np.median(upper)))
    return PairSummary(
        pairs=list(pairs),
        median=middle,
        interval=(float(lower[k - 1]), float(upper[count - k])),
        confidence=confidence,
        at_least=sum(low > 0 and high == math.inf for low, high in pairs),
        at_most=sum(low == 0 and high < math.inf for low, high in pairs),
        unknown=sum(low == 0 and high == math.inf for low, high in pairs),
    )
