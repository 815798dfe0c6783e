"""The phases of a comparison: the search of learning rates, the runs that confirm them, and variants of the set-up."""

from __future__ import annotations

from dataclasses import replace

from batchnorm.lab.comparison.measures import choose_rate, choose_target, summarize_rates
from batchnorm.lab.comparison.study import Study
from batchnorm.lab.comparison.workers import Workers
from batchnorm.lab.training.records import RecordName
from batchnorm.lab.training.runs import evaluation_steps
from batchnorm.lab.training.settings import ARMS, Arm, Inputs, Settings, neighboring_rate
from batchnorm.lab.training.stacks import Stack, cut

__all__ = ["confirming_stacks", "most_variant_steps", "search", "variant_stacks", "variants"]

VARIANT_FACTORS = (-1, 0, 1)


def search(workers: Workers, settings: Settings) -> Study:
    """Train every arm at every learning rate of the grid, and choose the target and each arm's learning rate.

    Where the best rate of an arm is at an edge of the default grid, one more rate beyond that edge is tried.
    """
    run, dataset, progress = workers.run, workers.dataset, workers.progress
    seeds = range(settings.search_seeds)
    evaluations = evaluation_steps(settings.steps)
    tried: list[float] = []
    new = list(settings.grid)
    while new:
        pairs = [(rate, seed) for rate in new for seed in seeds]
        name = "search" if not tried else f"search beyond {tried[0]:g} to {tried[-1]:g}"
        workers.train([s for arm in reversed(ARMS) for s in cut(name, "search", arm, pairs, settings)])
        extended = bool(tried)
        tried = sorted([*tried, *new])
        target = choose_target(
            run.runs("search", "none"),
            task=dataset.task,
            validation_rows=len(dataset.parts["validation"]),
            constant_loss=dataset.constant_loss,
            target_score=settings.target_score,
        )
        chosen: dict[Arm, float] = {
            arm: choose_rate(summarize_rates(run.runs("search", arm), target, evaluations)) for arm in ARMS
        }
        new = []
        if settings.learning_rates is None and not extended:
            new += [neighboring_rate(tried[0], -1)] if tried[0] in chosen.values() else []
            new += [neighboring_rate(tried[-1], 1)] if tried[-1] in chosen.values() else []
            for rate in new:
                for arm in ARMS:
                    progress.plan(arm, settings.search_seeds * settings.steps)
                progress.say(f"The best learning rate is at the edge of the grid: {rate:g} is tried too.")
    return Study(dataset, settings, run, target, chosen, tried)


def confirming_stacks(study: Study, records: tuple[RecordName, ...]) -> list[Stack]:
    """Return the stacks of the chosen learning rates on fresh seeds, the same seeds for every arm."""
    stacks = []
    for arm in reversed(ARMS):
        pairs = [(study.chosen[arm], seed) for seed in study.seeds]
        pieces = cut("confirm", "confirm", arm, pairs, study.settings, test=True, records=records)
        stacks += [replace(pieces[0], trace=True), *pieces[1:]]
    return stacks


def variants(settings: Settings) -> dict[str, Settings]:
    """Return set-ups that differ from the one asked for in one thing, and are trained for half the steps."""
    other: Inputs = "unscaled" if settings.inputs == "standardized" else "standardized"
    shorter = replace(settings, steps=settings.variant_steps)
    return {
        "initial weights x 0.1": replace(shorter, init_scale=settings.init_scale * 0.1),
        f"inputs {other}": replace(shorter, inputs=other),
    }


def most_variant_steps(settings: Settings) -> int:
    """Return the steps that the variants of an arm take at most, counted over its runs."""
    return sum(varied.steps * len(VARIANT_FACTORS) * settings.search_seeds for varied in variants(settings).values())


def variant_stacks(study: Study) -> list[Stack]:
    """Return the stacks of the variants, at each arm's chosen learning rate and those beside it in the grid.

    A stack stops as soon as most seeds of one learning rate have reached the target.
    """
    stacks = []
    for arm in ARMS:  # the arm that is least likely to reach the target, and so to stop early, comes first
        for name, varied in variants(study.settings).items():
            near = {neighboring_rate(study.chosen[arm], step) for step in VARIANT_FACTORS}
            pairs = [
                (rate, seed) for rate in study.tried if rate in near for seed in range(study.settings.search_seeds)
            ]
            stacks += cut(name, f"variant: {name}", arm, pairs, varied, stop=study.target)
    return stacks
