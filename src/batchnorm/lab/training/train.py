"""Training of a stack: several runs of one arm at once, each with a seed and a learning rate of its own."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from batchnorm.lab.data.dataset import Dataset
from batchnorm.lab.training.recorders import RECORDERS
from batchnorm.lab.training.runs import (
    CONSECUTIVE,
    Run,
    Target,
    TestResult,
    evaluation_steps,
    median_steps,
    rounded,
    steps_to,
)
from batchnorm.lab.training.settings import Arm, Settings
from batchnorm.lab.training.stacks import Stack
from batchnorm.lab.training.threads import limited_threads
from batchnorm.lab.training.trainer import Trainer

__all__ = ["seconds_per_step", "train"]

TRACED_UNITS = 6
TRACED_PERCENTILES = (15, 50, 85)
TIMED_STEPS = 200
WARM_UP_STEPS = 20


def _percentiles(trainer: Trainer) -> list[list[float]]:
    """Return percentiles of the inputs of the first run's last hidden nonlinearity, (units, 3)."""
    seen: list[Tensor] = []
    nonlinearity = trainer.network.hidden[-1].activation
    assert isinstance(nonlinearity, torch.nn.Module)
    hook = nonlinearity.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0][0, :, :TRACED_UNITS]))
    trainer.errors("validation")
    hook.remove()
    with np.errstate(invalid="ignore"):  # a diverged run has infinite values
        values = np.percentile(torch.cat(seen).numpy(), TRACED_PERCENTILES, axis=0)
    return [[rounded(float(value)) for value in unit] for unit in values.T]


class _BestState:
    """The state of each run at its best smoothed validation score, which is the mean of three evaluations."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self.score = torch.full((trainer.runs,), -math.inf, dtype=torch.float64)
        self.step = torch.zeros(trainer.runs, dtype=torch.long)
        self.state = [tensor.clone() for tensor in trainer.network.run_state()]

    def update(self, step: int, recent_scores: list[list[float]]) -> None:
        """Keep the current state of the runs whose recent validation scores have the best mean so far."""
        smoothed = torch.tensor(recent_scores, dtype=torch.float64).mean(1)
        better = smoothed > self.score
        self.score = torch.where(better, smoothed, self.score)
        self.step[better] = step
        for best, current in zip(self.state, self.trainer.network.run_state(), strict=True):
            best[better] = current[better]

    def test(self) -> Iterator[TestResult]:
        """Restore the best states and yield each run's result on the test rows, which nothing else reads."""
        for best, current in zip(self.state, self.trainer.network.run_state(), strict=True):
            current.copy_(best)
        _, errors = self.trainer.errors("test")
        scores = self.trainer.score(errors, "test")
        for step, score, of_run in zip(self.step, scores, errors, strict=True):
            yield TestResult.of(int(step), float(score), of_run.numpy(), self.trainer.dataset.task)


def _has_reached(runs: Sequence[Run], target: Target, evaluations: Sequence[int]) -> bool:
    """Return whether, at some learning rate, more than half of the seeds have reached the target."""
    steps: dict[float, list[int | None]] = {}
    for run in runs:
        steps.setdefault(run.learning_rate, []).append(steps_to(run, target, evaluations))
    return any(median_steps(of_rate) is not None for of_rate in steps.values())


def train(stack: Stack, dataset: Dataset, progress: Callable[[int], None]) -> list[Run]:
    """Train a stack and evaluate it on the way; ``progress`` is called with the number of steps taken."""
    settings = stack.settings
    trainer = Trainer(dataset, stack.arm, stack.learning_rates, stack.seeds, settings)
    runs = [Run(stack.arm, rate, seed) for rate, seed in zip(stack.learning_rates, stack.seeds, strict=True)]
    best = _BestState(trainer) if stack.test else None
    diverged = torch.zeros(len(runs), dtype=torch.long)
    summed, since = torch.zeros(len(runs)), 0
    trace: list[list[list[float]]] = []
    recorders = [RECORDERS[name](trainer, settings) for name in stack.records]
    evaluations = evaluation_steps(settings.steps)
    evaluate_at = set(evaluations)
    for step in range(1, settings.steps + 1):
        for recorder in recorders:
            recorder.before(step)
        losses = trainer.step()
        for recorder in recorders:
            recorder.after(step, losses)
        diverged[(diverged == 0) & ~losses.isfinite()] = step
        summed, since = summed + losses, since + 1
        if step not in evaluate_at:
            continue
        row_losses, errors = trainer.errors("validation")
        loss = row_losses.mean(1)
        diverged[(diverged == 0) & ~loss.isfinite()] = step
        score = trainer.score(errors, "validation")
        for i, run in enumerate(runs):
            over = bool(diverged[i])
            run.diverged_at = int(diverged[i]) or None
            run.train_loss.append(math.nan if over else rounded(float(summed[i]) / since))
            run.validation_loss.append(math.nan if over else rounded(float(loss[i])))
            run.validation_score.append(math.nan if over else float(score[i]))
        summed, since = torch.zeros(len(runs)), 0
        if best is not None:
            best.update(step, [run.validation_score[-CONSECUTIVE:] for run in runs])
        if stack.trace:
            trace.append(_percentiles(trainer))
        progress(step)
        if stack.stop is not None and _has_reached(runs, stack.stop, evaluations):
            break
    if stack.trace:
        runs[0].trace = trace
    for recorder in recorders:
        for i, run in enumerate(runs):
            recorder.store(i, run.record)
    if best is not None:
        for run, test in zip(runs, best.test(), strict=True):
            run.test = test if run.diverged_at is None else replace(test, score=math.nan)
    return runs


def seconds_per_step(dataset: Dataset, rates: Mapping[Arm, float], settings: Settings) -> dict[Arm, float]:
    """Return the median seconds per gradient step of each arm: one run on one thread, the arms in turn."""
    with limited_threads(1):
        trainers = {arm: Trainer(dataset, arm, [rate], [0], settings) for arm, rate in rates.items()}
        spent: dict[Arm, list[float]] = {arm: [] for arm in rates}
        for turn in range(WARM_UP_STEPS + TIMED_STEPS):
            for arm, trainer in trainers.items():
                started = time.perf_counter()
                trainer.step()
                if turn >= WARM_UP_STEPS:
                    spent[arm].append(time.perf_counter() - started)
    return {arm: float(np.median(times)) for arm, times in spent.items()}
