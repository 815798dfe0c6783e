"""What is counted: the target, steps to it, the choice of a learning rate, ratios and their intervals.

A run that does not reach the target within its S steps took "more than S": it is neither dropped nor given a
number. Quantities that depend on such runs are kept as bounds (lower, upper), which meet where they are known.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from batchnorm.lab.training.runs import Measure, Run, Target, median_steps, steps_to

__all__ = [
    "Bounds",
    "RateSummary",
    "best_rate",
    "choose_rate",
    "choose_target",
    "median_ratio",
    "middle_half",
    "order_statistic",
    "paired_difference",
    "ratio_bounds",
    "summarise_rates",
]

SHARE_OF_BEST = 0.99
CONFIDENCE = 0.95
FEWEST_VALIDATION_ROWS = 100
Bounds = tuple[float, float]


def _median(values: Sequence[float]) -> float:
    return float(np.median(values)) if len(values) else math.nan


def _best(run: Run, measure: Measure) -> float:
    """Best value of a run; that of a diverged one is the worst there is."""
    worst = -math.inf if measure == "score" else math.inf
    if run.diverged_at is not None:
        return worst
    return max(run.validation_score) if measure == "score" else min(run.validation_loss)


def best_rate(runs: Sequence[Run], measure: Measure) -> tuple[float, float]:
    """Learning rate with the best median over seeds of the best validation value, and that median."""
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
    """The target that the search of the arm without batch normalization sets.

    0.99 of the median over seeds of its best validation score, at its best learning rate, rounded down to a
    multiple of 1 / (validation rows). On fewer than 100 validation rows, or where that is not positive, the same
    of the validation loss: 0.99 of the best reduction below the loss of a constant guess, or within 1% of the best
    loss where it is no reduction. One that nothing reaches where every run diverged. A target score given overrides
    all this.
    """
    name = "R2" if task == "regression" else "accuracy"
    if target_score is not None:
        return Target("score", target_score, f"a validation {name} of {target_score:g}, as asked")
    _, score = best_rate(baseline, "score")
    value = math.floor(SHARE_OF_BEST * score * validation_rows + 1e-9) / validation_rows if score > 0 else 0.0
    if value > 0 and validation_rows >= FEWEST_VALIDATION_ROWS:
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
    """How the search seeds of an arm fared at one learning rate."""

    learning_rate: float
    seeds: int
    reached: int
    diverged: int
    median_steps: float | None
    best_score: float
    best_loss: float


def summarise_rates(runs: Sequence[Run], target: Target, evaluations: Sequence[int]) -> list[RateSummary]:
    """One `RateSummary` for each learning rate of an arm, in ascending order."""
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
    """The learning rate of an arm: most seeds that reach the target, then least median steps, then least loss."""

    def order(summary: RateSummary) -> tuple[float, ...]:
        steps = math.inf if summary.median_steps is None else summary.median_steps
        return (-summary.reached, steps, summary.best_loss)

    return min(summaries, key=order).learning_rate


def ratio_bounds(baseline: int | None, arm: int | None, steps: int) -> Bounds:
    """Bounds of baseline / arm, the times fewer steps, where one that is None took more than ``steps``."""
    if baseline is not None and arm is not None:
        return baseline / arm, baseline / arm
    lower = 0.0 if arm is None else steps / arm
    upper = math.inf if baseline is None else baseline / steps
    return lower, upper


def middle_half(values: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Median over the first axis, and the order statistics at or just outside its quartiles."""
    ordered = np.sort(values, axis=0)
    last = len(ordered) - 1
    return np.median(ordered, axis=0), ordered[math.floor(last / 4)], ordered[math.ceil(last * 3 / 4)]


def order_statistic(count: int) -> tuple[int, float]:
    """Which order statistics k and n + 1 - k bound the median with at least 95% confidence, and with how much.

    Where even the extremes fall short, those. Exact for independent pairs (the sign test).

    >>> order_statistic(10)
    (2, 0.978515625)
    """

    def coverage(k: int) -> float:
        return 1.0 - 2.0 * sum(math.comb(count, i) for i in range(k)) / 2.0**count

    k = max((k for k in range(1, count // 2 + 1) if coverage(k) >= CONFIDENCE), default=1)
    return k, max(coverage(k), 0.0)


def median_ratio(pairs: Sequence[Bounds]) -> dict[str, Any]:
    """Median of paired ratios and its interval, each as bounds, with the counts of pairs that are only bounded."""
    count = len(pairs)
    k, confidence = order_statistic(count)
    lower = np.sort([pair[0] for pair in pairs])
    upper = np.sort([pair[1] for pair in pairs])
    with np.errstate(invalid="ignore"):
        middle = (float(np.median(lower)), float(np.median(upper)))
    return {
        "pairs": [list(pair) for pair in pairs],
        "median": list(middle),
        "interval": [float(lower[k - 1]), float(upper[count - k])],
        "confidence": confidence,
        "at_least": sum(low > 0 and high == math.inf for low, high in pairs),
        "at_most": sum(low == 0 and high < math.inf for low, high in pairs),
        "unknown": sum(low == 0 and high == math.inf for low, high in pairs),
    }


def paired_difference(
    arm: NDArray[np.float64], baseline: NDArray[np.float64], spread: NDArray[np.float64] | None, seed: int
) -> dict[str, Any]:
    """Difference of the mean test score and its 95% interval, by a bootstrap over test rows and seeds.

    ``arm`` and ``baseline`` are errors (seeds, rows), paired; ``spread`` is the squared distance of each row's
    target from the mean of the test targets, by which squared errors become R squared (None for accuracy).
    """
    seeds, rows = arm.shape
    gain = baseline - arm

    def difference(by_seed: NDArray[np.float64], by_row: NDArray[np.float64]) -> NDArray[np.float64]:
        per_row = (by_seed @ gain) / seeds
        divisor = np.full(len(by_row), float(rows)) if spread is None else by_row @ spread
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
    return {"estimate": float(estimate), "interval": [float(low), float(high)], "seeds": seeds}
