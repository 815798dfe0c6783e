"""Training a stack: several runs of one arm at once, each with its own seed and learning rate."""

from __future__ import annotations

import base64
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from batchnorm.lab.data import Dataset, Task
from batchnorm.lab.network import MLP, batch_bounds
from batchnorm.lab.runs import CONSECUTIVE, Run, Target, evaluation_steps, median_steps, steps_to
from batchnorm.lab.settings import PLACEMENTS, Arm, Settings

__all__ = ["Stack", "Trainer", "row_errors", "seconds_a_step", "train"]

TRACED_UNITS = 6
TRACED_PERCENTILES = (15, 50, 85)
NUMBERS_AT_ONCE = 4_000_000


@dataclass(frozen=True)
class Stack:
    """A unit of work: runs of one arm, trained together. Set by the plan, never by the number of workers."""

    key: str
    phase: str
    arm: Arm
    learning_rates: tuple[float, ...]
    seeds: tuple[int, ...]
    settings: Settings
    test: bool = False
    trace: bool = False
    stop: Target | None = None


def _generator(settings: Settings, seed: int, stream: int) -> torch.Generator:
    """Initial weights (stream 0) and order of mini-batches (1) of a seed; the same in every arm and stack."""
    state = np.random.SeedSequence([settings.seed, seed, stream]).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state >> np.uint64(1)))


def _batches(generators: Sequence[torch.Generator], rows: int, batch_size: int) -> Iterator[Tensor]:
    """Row numbers (runs, batch) of one mini-batch after another, each run in its own order, without end."""
    while True:
        orders = torch.stack([torch.randperm(rows, generator=generator) for generator in generators])
        for start, end in batch_bounds(rows, batch_size):
            yield orders[:, start:end]


class _Descent:
    """Gradient descent, plain or Adam (Kingma & Ba 2015), with a learning rate a run."""

    def __init__(self, network: MLP, name: str, learning_rates: Sequence[float]) -> None:
        self.parameters = list(network.parameters())
        self.views = [parameter.detach().view(network.runs, -1) for parameter in self.parameters]
        self.rates = torch.tensor(learning_rates, dtype=self.views[0].dtype).view(-1, 1)
        self.adam = name == "adam"
        self.first = [torch.zeros_like(view) for view in self.views] if self.adam else []
        self.second = [torch.zeros_like(view) for view in self.views] if self.adam else []
        self.taken = 0

    def step(self, losses: Tensor) -> None:
        """One step down each run's loss (runs,)."""
        gradients = torch.autograd.grad(losses.sum(), self.parameters)
        moves = [gradient.view_as(view) for gradient, view in zip(gradients, self.views, strict=True)]
        if self.adam:
            self.taken += 1
            torch._foreach_lerp_(self.first, moves, 1 - 0.9)
            torch._foreach_mul_(self.second, 0.999)
            torch._foreach_addcmul_(self.second, moves, moves, 1 - 0.999)
            sizes = torch._foreach_div(self.second, 1 - 0.999**self.taken)
            torch._foreach_sqrt_(sizes)
            torch._foreach_add_(sizes, 1e-8)
            moves = list(torch._foreach_div(torch._foreach_div(self.first, 1 - 0.9**self.taken), sizes))
        for view, move in zip(self.views, moves, strict=True):
            view.addcmul_(move, self.rates, value=-1)


def _losses(task: Task, output: Tensor, y: Tensor) -> Tensor:
    """Loss of each row (runs, N): cross-entropy in nats, or the squared error of the standardised target."""
    y = y.expand(output.shape[:2])
    if task == "regression":
        return (output.squeeze(2) - y) ** 2
    return F.cross_entropy(output.flatten(0, 1), y.flatten(), reduction="none").view(y.shape)


def row_errors(task: Task, output: Tensor, y: Tensor) -> Tensor:
    """Error of each row (runs, N): 1 for a wrong class and 0 for the right one, or the squared error."""
    if task == "regression":
        return _losses(task, output, y)
    return (output.argmax(2) != y).to(output.dtype)


class Trainer:
    """The network of a stack, its data and its state, one gradient step at a time."""

    def __init__(
        self, dataset: Dataset, arm: Arm, learning_rates: Sequence[float], seeds: Sequence[int], settings: Settings
    ) -> None:
        self.dataset = dataset
        self.runs = len(seeds)
        standardized = settings.inputs == "standardized"
        self.parts = {
            name: tuple(torch.from_numpy(array) for array in dataset.part(name, standardized=standardized))
            for name in ("train", "validation", "test")
        }
        x, _ = self.parts["train"]
        self.network = MLP(
            x.shape[1],
            settings.hidden,
            dataset.outputs,
            activation=settings.activation,
            placement=PLACEMENTS[arm],
            runs=self.runs,
        ).to(x.dtype)
        self.network.initialise([_generator(settings, seed, 0) for seed in seeds], settings.init, settings.init_scale)
        self.batches = _batches([_generator(settings, seed, 1) for seed in seeds], len(x), settings.batch_size)
        self.descent = _Descent(self.network, settings.optimizer, learning_rates)

    def step(self) -> Tensor:
        """Take one gradient step on each run's next mini-batch; returns the losses before it (runs,)."""
        x, y = self.parts["train"]
        rows = next(self.batches)
        self.network.train()
        losses = _losses(self.dataset.task, self.network(x[rows]), y[rows]).mean(1)
        self.descent.step(losses)
        return losses.detach()

    @torch.no_grad()
    def errors(self, part: str) -> tuple[Tensor, Tensor]:
        """Loss and error of each row of a part (runs, N), with the statistics that inference uses."""
        x, y = self.parts[part]
        self.network.eval()
        widest = max(x.shape[1], *(linear.weight.shape[2] for linear in self.network.linears()))
        rows = max(1, NUMBERS_AT_ONCE // (self.runs * widest))
        losses, errors = [], []
        for some_x, some_y in zip(torch.split(x, rows), torch.split(y, rows), strict=True):
            output = self.network(some_x)
            losses.append(_losses(self.dataset.task, output, some_y))
            errors.append(row_errors(self.dataset.task, output, some_y))
        return torch.cat(losses, 1), torch.cat(errors, 1)

    def score(self, errors: Tensor, part: str) -> Tensor:
        """Accuracy, or R squared, of each run from the errors of the rows, in float64."""
        rows = errors.shape[1]
        wrong = errors.double().sum(1)
        if self.dataset.task == "classification":
            return (rows - wrong) / rows  # the very float that a target of k / rows is
        _, y = self.parts[part]
        return 1 - wrong / ((y.double() - y.double().mean()) ** 2).sum()


def _percentiles(trainer: Trainer) -> list[list[float]]:
    """15th, 50th and 85th percentile of what enters the first run's last hidden nonlinearity, some units."""
    seen: list[Tensor] = []
    nonlinearity = trainer.network.hidden[-1].activation
    assert isinstance(nonlinearity, torch.nn.Module)
    hook = nonlinearity.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0][0, :, :TRACED_UNITS]))
    trainer.errors("validation")
    hook.remove()
    with np.errstate(invalid="ignore"):  # a diverged run has infinite values
        values = np.percentile(torch.cat(seen).numpy(), TRACED_PERCENTILES, axis=0)
    return [[_rounded(float(value)) for value in unit] for unit in values.T]


class _Best:
    """The network as it was at each run's best smoothed validation score: the mean of three evaluations."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self.score = torch.full((trainer.runs,), -math.inf, dtype=torch.float64)
        self.step = torch.zeros(trainer.runs, dtype=torch.long)
        self.state = [tensor.clone() for tensor in trainer.network.run_state()]

    def see(self, step: int, recent_scores: list[list[float]]) -> None:
        """Keep the state of the runs whose mean of the recent validation scores is their best so far."""
        smoothed = torch.tensor(recent_scores, dtype=torch.float64).mean(1)
        better = smoothed > self.score
        self.score = torch.where(better, smoothed, self.score)
        self.step[better] = step
        for kept, now in zip(self.state, self.trainer.network.run_state(), strict=True):
            kept[better] = now[better]

    def test(self) -> Iterator[dict[str, Any]]:
        """Score of each run on the test rows, read here and nowhere else."""
        for kept, now in zip(self.state, self.trainer.network.run_state(), strict=True):
            now.copy_(kept)
        _, errors = self.trainer.errors("test")
        scores = self.trainer.score(errors, "test")
        for step, score, rows in zip(self.step, scores, errors, strict=True):
            yield {"step": int(step), "score": float(score), "errors": _encoded(self.trainer.dataset.task, rows)}


def _encoded(task: Task, errors: Tensor) -> str:
    """Errors of the test rows in base64: a bit a row for classes, a little-endian float32 a row for numbers."""
    values = errors.numpy()
    packed = np.packbits(values > 0) if task == "classification" else values.astype("<f4")
    return base64.b64encode(packed.tobytes()).decode()


def _arrived(runs: Sequence[Run], target: Target, evaluations: Sequence[int]) -> bool:
    """Whether at some learning rate more than half of the seeds have reached the target."""
    steps: dict[float, list[int | None]] = {}
    for run in runs:
        steps.setdefault(run.learning_rate, []).append(steps_to(run, target, evaluations))
    return any(median_steps(of_rate) is not None for of_rate in steps.values())


def train(stack: Stack, dataset: Dataset, progress: Callable[[int], None]) -> list[Run]:
    """Train a stack and evaluate it as it goes; ``progress`` is told the steps taken."""
    settings = stack.settings
    trainer = Trainer(dataset, stack.arm, stack.learning_rates, stack.seeds, settings)
    runs = [Run(stack.arm, rate, seed) for rate, seed in zip(stack.learning_rates, stack.seeds, strict=True)]
    best = _Best(trainer) if stack.test else None
    diverged = torch.zeros(len(runs), dtype=torch.long)
    summed, since = torch.zeros(len(runs)), 0
    trace: list[list[list[float]]] = []
    evaluations = evaluation_steps(settings.steps)
    evaluate_at = set(evaluations)
    for step in range(1, settings.steps + 1):
        losses = trainer.step()
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
            run.train_loss.append(math.nan if over else _rounded(float(summed[i]) / since))
            run.validation_loss.append(math.nan if over else _rounded(float(loss[i])))
            run.validation_score.append(math.nan if over else float(score[i]))
        summed, since = torch.zeros(len(runs)), 0
        if best is not None:
            best.see(step, [run.validation_score[-CONSECUTIVE:] for run in runs])
        if stack.trace:
            trace.append(_percentiles(trainer))
        progress(step)
        if stack.stop is not None and _arrived(runs, stack.stop, evaluations):
            break
    if stack.trace:
        runs[0].trace = trace
    if best is not None:
        for run, test in zip(runs, best.test(), strict=True):
            run.test = test if run.diverged_at is None else dict(test, score=math.nan)
    return runs


def _rounded(value: float) -> float:
    """Six digits: what a float32 sum is good for, and what run.json needs to hold."""
    return float(f"{value:.6g}")


def seconds_a_step(dataset: Dataset, rates: dict[Arm, float], settings: Settings) -> dict[str, float]:
    """Median seconds of a gradient step of each arm, one run alone on one thread, the arms taken in turn."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        trainers = {arm: Trainer(dataset, arm, [rate], [0], settings) for arm, rate in rates.items()}
        spent: dict[str, list[float]] = {arm: [] for arm in rates}
        for turn in range(220):
            for arm, trainer in trainers.items():
                started = time.perf_counter()
                trainer.step()
                if turn >= 20:  # after the warm-up
                    spent[arm].append(time.perf_counter() - started)
    finally:
        torch.set_num_threads(threads)
    return {arm: float(np.median(times)) for arm, times in spent.items()}
