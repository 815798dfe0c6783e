"""The networks of a stack, their data and their state, one gradient step at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from batchnorm.lab.data.dataset import Dataset, Task
from batchnorm.lab.training.network import MLP, batch_bounds
from batchnorm.lab.training.settings import ARMS, PLACEMENTS, Arm, Settings
from batchnorm.nn import BatchNorm1d

__all__ = ["Trainer", "row_errors"]

NUMBERS_AT_ONCE = 4_000_000


def _generator(settings: Settings, arm: Arm, seed: int, stream: int) -> torch.Generator:
    """Initial weights (stream 0) and order of mini-batches (1) of a seed; the same in every arm and stack.

    In an A/A check each arm confirms with weights and orders of its own; the search is one, as the arm is.
    """
    own = [] if settings.null_arm is None or seed < settings.search_seeds else [ARMS.index(arm)]
    state = np.random.SeedSequence([settings.seed, seed, stream, *own]).generate_state(1, np.uint64)[0]
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
            placement=PLACEMENTS[settings.null_arm or arm],
            runs=self.runs,
        ).to(x.dtype)
        self.network.initialise(
            [_generator(settings, arm, seed, 0) for seed in seeds], settings.init, settings.init_scale
        )
        self.batches = _batches([_generator(settings, arm, seed, 1) for seed in seeds], len(x), settings.batch_size)
        self.descent = _Descent(self.network, settings.optimizer, learning_rates)

    def step(self) -> Tensor:
        """Take one gradient step on each run's next mini-batch; returns the losses before it (runs,)."""
        x, y = self.parts["train"]
        rows = next(self.batches)
        self.network.train()
        losses = _losses(self.dataset.task, self.network(x[rows]), y[rows]).mean(1)
        self.descent.step(losses)
        return losses.detach()

    def errors(self, part: str) -> tuple[Tensor, Tensor]:
        """Loss and error of each row of a part (runs, N), with the statistics that inference uses."""
        return self.errors_on(*self.parts[part])

    @torch.no_grad()
    def errors_on(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Loss and error of each of some rows (runs, N), with the statistics that inference uses."""
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
        """Accuracy, or R squared, of each run from the errors of the rows of a part, in float64."""
        return self.score_on(errors, self.parts[part][1])

    def score_on(self, errors: Tensor, y: Tensor) -> Tensor:
        """Accuracy, or R squared, of each run from the errors on rows with targets y, in float64."""
        rows = errors.shape[1]
        wrong = errors.double().sum(1)
        if self.dataset.task == "classification":
            return (rows - wrong) / rows  # the very float that a target of k / rows is
        return 1 - wrong / ((y.double() - y.double().mean()) ** 2).sum()

    def some_rows(self, part: str, most: int) -> tuple[Tensor, Tensor]:
        """At most so many rows of a part, spread evenly over it."""
        x, y = self.parts[part]
        chosen = torch.from_numpy(np.linspace(0, len(x) - 1, min(most, len(x))).round().astype(np.int64))
        return x[chosen], y[chosen]

    @contextmanager
    def batch_statistics(self) -> Iterator[None]:
        """Normalise with the batch's own statistics, as in training, and leave the running ones as they are."""
        layers = [module for module in self.network.modules() if isinstance(module, BatchNorm1d)]
        momenta = [layer.momentum for layer in layers]
        self.network.train()
        for layer in layers:
            layer.momentum = 0.0
        try:
            yield
        finally:
            for layer, momentum in zip(layers, momenta, strict=True):
                layer.momentum = momentum

    def gradients(self, x: Tensor, y: Tensor) -> list[Tensor]:
        """Gradient of each run's mean loss on some rows, a view (runs, numbers) for each parameter."""
        with self.batch_statistics():
            losses = _losses(self.dataset.task, self.network(x), y).mean(1)
        gradients = torch.autograd.grad(losses.sum(), self.descent.parameters)
        return [gradient.view(self.runs, -1) for gradient in gradients]
