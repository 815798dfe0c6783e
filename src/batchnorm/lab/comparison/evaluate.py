"""Computation of the result of a comparison from its runs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from batchnorm.lab.comparison.measures import (
    MIN_VALIDATION_ROWS,
    Bounds,
    ratio_bounds,
    summarize_pairs,
    summarize_rates,
)
from batchnorm.lab.comparison.result import ArmResult, MedianRatio, Ratio, Result, Stacking, Variant
from batchnorm.lab.comparison.run_file import RunFile
from batchnorm.lab.comparison.scores import test_difference
from batchnorm.lab.comparison.study import Study
from batchnorm.lab.comparison.verdict import caveat, verdict
from batchnorm.lab.training.runs import Run, Target, evaluation_steps, median_steps, steps_to
from batchnorm.lab.training.settings import ARMS, Arm, Settings

__all__ = ["evaluate"]

Seconds = Mapping[Arm, float]


def evaluate(study: Study, seconds: Seconds | None = None) -> Result:
    """Return the result as far as the runs go; ``seconds`` are those of a step of each arm, once measured."""
    run, settings, target = study.run, study.settings, study.target
    evaluations = evaluation_steps(settings.steps)
    rows = len(study.dataset.parts["validation"])
    result = Result(
        score_name="R2" if study.dataset.task == "regression" else "accuracy",
        target=target,
        headline=rows >= MIN_VALIDATION_ROWS and math.isfinite(target.value),
        grid=sorted({r.learning_rate for r in run.runs("search")}),
        evaluation_steps=evaluations,
        arms={arm: _arm(study, arm, evaluations, seconds) for arm in ARMS},
        ratios={},
        sensitivity=_sensitivity(run, settings, target),
        stacking=None if seconds is None else _stacking(run, seconds, evaluations),
        notes=run.data.sentences,
    )
    if any(len(values.steps) < settings.seeds for values in result.arms.values()):
        return result
    result = replace(result, ratios={arm: _ratio(study, result, arm) for arm in ARMS[1:]})
    return replace(result, verdict=verdict(result, study.dataset.name, settings.steps), caveat=caveat(result, rows))


def _arm(study: Study, arm: Arm, evaluations: Sequence[int], seconds: Seconds | None) -> ArmResult:
    confirmed = study.run.runs("confirm", arm)
    steps = [steps_to(run, study.target, evaluations) for run in confirmed]
    scores = [math.nan if run.test is None else run.test.score for run in confirmed]
    known = [score for score in scores if not math.isnan(score)]
    search = summarize_rates(study.run.runs("search", arm), study.target, evaluations)
    return ArmResult(
        learning_rate=study.chosen[arm],
        search=search,
        rates_that_reach=sum(summary.reached == summary.seeds for summary in search),
        steps=steps,
        median_steps=median_steps(steps) if steps else None,
        diverged=sum(run.diverged_at is not None for run in confirmed),
        seconds_per_step=None if seconds is None else seconds[arm],
        test_scores=scores,
        test_score=float(np.mean(known)) if known else math.nan,
    )


def _ratio(study: Study, result: Result, arm: Arm) -> Ratio:
    """Return the ratio of steps, without batch norm over with it, once all confirming runs are finished."""
    none, some = result.arms["none"], result.arms[arm]
    steps = zip(none.steps, some.steps, strict=True)
    summary = summarize_pairs([ratio_bounds(*pair, study.settings.steps) for pair in steps])
    seconds = None
    if none.seconds_per_step is not None and some.seconds_per_step is not None:
        factor = none.seconds_per_step / some.seconds_per_step
        seconds = MedianRatio(_scaled(summary.median, factor), _scaled(summary.interval, factor))
    runs, baseline = (study.run.runs("confirm", one) for one in (arm, "none"))
    difference = test_difference(runs, baseline, study.dataset, study.settings.seed)
    return Ratio(**vars(summary), seconds=seconds, test_difference=difference)


def _scaled(bounds: Bounds, factor: float) -> Bounds:
    return bounds[0] * factor, bounds[1] * factor


def _sensitivity(run: RunFile, settings: Settings, target: Target) -> list[Variant]:
    """Return, for each variant of the set-up, the median steps of each arm at the best of three learning rates."""
    phases = list(dict.fromkeys(stack.phase for stack in run.stacks if stack.phase.startswith("variant")))
    if not phases:
        return []
    evaluations = evaluation_steps(settings.steps)
    tried = {arm: {r.learning_rate for r in run.runs(phases[0], arm)} for arm in ARMS}
    variants = []
    for phase in ["search", *phases]:
        steps: dict[Arm, float | None] = {
            arm: _best_median(run.runs(phase, arm), target, evaluations, tried[arm], settings.variant_steps)
            for arm in ARMS
        }
        variants.append(Variant("as set up" if phase == "search" else phase.removeprefix("variant: "), steps))
    return variants


def _best_median(
    runs: Sequence[Run], target: Target, evaluations: Sequence[int], rates: set[float], within: int
) -> float | None:
    """Return the median steps over the seeds at the best of some learning rates; None where it is above ``within``."""
    medians = []
    for rate in rates:
        steps = [steps_to(run, target, evaluations) for run in runs if run.learning_rate == rate]
        medians.append(median_steps([step if step and step <= within else None for step in steps]))
    return min((median for median in medians if median is not None), default=None)


def _stacking(run: RunFile, seconds: Seconds, evaluations: Sequence[int]) -> Stacking:
    together = sum(stack.seconds for stack in run.stacks)
    alone = sum(
        evaluations[len(trained.train_loss) - 1] * seconds[stack.arm] for stack in run.stacks for trained in stack.runs
    )
    runs = sum(len(stack.runs) for stack in run.stacks)
    return Stacking(runs, together, alone, alone / together)
