"""The result of a comparison: every figure that the terminal and the report show, computed from the runs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from numpy.typing import NDArray

from batchnorm.lab.comparison.measures import (
    FEWEST_VALIDATION_ROWS,
    median_ratio,
    paired_difference,
    ratio_bounds,
    summarise_rates,
)
from batchnorm.lab.comparison.run_file import RunFile
from batchnorm.lab.comparison.verdict import caveat, verdict
from batchnorm.lab.data.dataset import Dataset
from batchnorm.lab.training.runs import Run, Target, evaluation_steps, median_steps, steps_to
from batchnorm.lab.training.settings import ARMS, Arm, Settings

__all__ = ["evaluate", "test_difference", "test_errors"]


def test_errors(runs: Sequence[Run], dataset: Dataset) -> NDArray[np.float64]:
    """Errors (seeds, test rows) as the runs kept them."""
    rows = len(dataset.parts["test"])
    return np.stack([run.test.row_errors(dataset.task, rows) for run in runs if run.test is not None])


def test_difference(arm: Sequence[Run], baseline: Sequence[Run], dataset: Dataset, seed: int) -> dict[str, Any] | None:
    """Difference of the test scores over the pairs in which neither run diverged."""
    pairs = [(a, b) for a, b in zip(arm, baseline, strict=True) if a.diverged_at is None and b.diverged_at is None]
    if not pairs:
        return None
    spread = None
    if dataset.task == "regression":
        y = dataset.y[dataset.parts["test"]]
        spread = (y - y.mean()) ** 2
    return paired_difference(
        test_errors([a for a, _ in pairs], dataset), test_errors([b for _, b in pairs], dataset), spread, seed
    )


def _best_median(
    runs: Sequence[Run], target: Target, evaluations: Sequence[int], rates: set[float], within: int
) -> float | None:
    """Median steps over the seeds, at the best of some learning rates; None where that is above ``within``."""
    medians = []
    for rate in rates:
        steps = [steps_to(run, target, evaluations) for run in runs if run.learning_rate == rate]
        medians.append(median_steps([step if step and step <= within else None for step in steps]))
    return min((median for median in medians if median is not None), default=None)


def _sensitivity(run: RunFile, settings: Settings, target: Target) -> list[dict[str, Any]]:
    """For each variant of the set-up and each arm, the median steps at the best of three learning rates."""
    phases = list(
        dict.fromkeys(stack["phase"] for stack in run.content["stacks"] if stack["phase"].startswith("variant"))
    )
    if not phases:
        return []
    evaluations = evaluation_steps(settings.steps)
    rows: list[dict[str, Any]] = []
    tried = {arm: {r.learning_rate for r in run.runs(phases[0], arm)} for arm in ARMS}
    for phase in ["search", *phases]:
        name = "as set up" if phase == "search" else phase.removeprefix("variant: ")
        arrivals = {
            arm: _best_median(run.runs(phase, arm), target, evaluations, tried[arm], settings.variant_steps)
            for arm in ARMS
        }
        rows.append({"name": name, "steps": arrivals})
    return rows


def _stacking(run: RunFile, seconds: dict[Arm, float], evaluations: Sequence[int]) -> dict[str, float]:
    """What training in stacks cost, and what the same steps cost one run after another, in seconds of a core."""
    together = sum(stack["seconds"] for stack in run.content["stacks"])
    alone = sum(
        evaluations[len(values["train_loss"]) - 1] * seconds[stack["arm"]]
        for stack in run.content["stacks"]
        for values in stack["runs"]
    )
    runs = sum(len(stack["runs"]) for stack in run.content["stacks"])
    return {"runs": runs, "together": together, "alone": alone, "factor": alone / together}


def evaluate(
    run: RunFile,
    dataset: Dataset,
    settings: Settings,
    target: Target,
    chosen: dict[Arm, float],
    seconds: dict[Arm, float] | None = None,
) -> dict[str, Any]:
    """The result as far as the runs go; its keys are described in docs/compare.md."""
    evaluations = evaluation_steps(settings.steps)
    confirmed = {arm: run.runs("confirm", arm) for arm in ARMS}
    finished = all(len(runs) == settings.seeds for runs in confirmed.values())
    arrivals = {arm: [steps_to(r, target, evaluations) for r in runs] for arm, runs in confirmed.items()}
    rows = len(dataset.parts["validation"])
    result: dict[str, Any] = {
        "score_name": "R2" if dataset.task == "regression" else "accuracy",
        "target": asdict(target),
        "headline": rows >= FEWEST_VALIDATION_ROWS and math.isfinite(target.value),
        "grid": sorted({r.learning_rate for r in run.runs("search")}),
        "evaluation_steps": evaluations,
        "arms": {},
        "ratios": {},
        "sensitivity": _sensitivity(run, settings, target),
        "stacking": None if seconds is None else _stacking(run, seconds, evaluations),
    }
    for arm in ARMS:
        scores = [math.nan if r.test is None else r.test.score for r in confirmed[arm]]
        known = [score for score in scores if not math.isnan(score)]
        summaries = summarise_rates(run.runs("search", arm), target, evaluations)
        result["arms"][arm] = {
            "learning_rate": chosen[arm],
            "search": [asdict(summary) for summary in summaries],
            "rates_that_reach": sum(summary.reached == summary.seeds for summary in summaries),
            "steps": arrivals[arm],
            "median_steps": median_steps(arrivals[arm]) if arrivals[arm] else None,
            "diverged": sum(r.diverged_at is not None for r in confirmed[arm]),
            "seconds_a_step": None if seconds is None else seconds[arm],
            "test_scores": scores,
            "test_score": float(np.mean(known)) if known else math.nan,
        }
    if finished:
        for arm in ARMS[1:]:
            pairs = [
                ratio_bounds(none, some, settings.steps)
                for none, some in zip(arrivals["none"], arrivals[arm], strict=True)
            ]
            ratio = median_ratio(pairs)
            if seconds is not None:
                factor = seconds["none"] / seconds[arm]
                ratio["seconds"] = {name: [bound * factor for bound in ratio[name]] for name in ("median", "interval")}
            ratio["test_difference"] = test_difference(confirmed[arm], confirmed["none"], dataset, settings.seed)
            result["ratios"][arm] = ratio
        result["verdict"] = verdict(result, dataset.name, settings.steps)
        result["caveat"] = caveat(result, rows)
    return result
