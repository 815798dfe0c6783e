"""Trainer of a stack: its networks, their data and their state, advanced one gradient step at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from batchnorm.lab.data.dataset import Dataset, PartName, Task
from batchnorm.lab.training.network import MLP, batch_bounds
from batchnorm.lab.training.settings import ARMS, PLACEMENTS, Arm, Settings
from batchnorm.nn import BatchNorm1d

__all__ = ["Trainer", "row_errors"]

NUMBERS_AT_ONCE = 4_000_000
PARTS: tuple[PartName, ...] = ("train", "validation", "test")


class LabeledRows(NamedTuple):
    """Features (N, features) and targets (N,) of some rows."""

    x: Tensor
    y: Tensor


def _generator(settings: Settings, arm: Arm, seed: int, stream: int) -> torch.Generator:
    """Return the generator of the initial weights (stream 0) or the order of the rows (stream 1) of a seed.

    It is the same in every arm and stack. In an A/A check the confirming runs of each arm get weights and orders of
    their own; the search is shared, as the network is.
    """
    is_shared = settings.null_arm is None or seed < settings.search_seeds
    key = [settings.seed, seed, stream, *([] if is_shared else [ARMS.index(arm)])]
    state = np.random.SeedSequence(key).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state >> np.uint64(1)))


def _batches(generators: Sequence[torch.Generator], rows: int, batch_size: int) -> Iterator[Tensor]:
    """Yield the row numbers (runs, batch) of one mini-batch after another, each run in an order of its own."""
    while True:
        orders = torch.stack([torch.randperm(rows, generator=generator) for generator in generators])
        for start, end in batch_bounds(rows, batch_size):
            yield orders[:, start:end]


class _GradientDescent:
    """Stochastic gradient descent, or Adam (Kingma & Ba 2015), with a learning rate per run."""

    def __init__(self, network: MLP, name: str, learning_rates: Sequence[float]) -> None:
        self.parameters = list(network.parameters())
        self.views = [parameter.detach().view(network.runs, -1) for parameter in self.parameters]
        self.rates = torch.tensor(learning_rates, dtype=self.views[0].dtype).view(-1, 1)
        self.adam = name == "adam"
        self.first = [torch.zeros_like(view) for view in self.views] if self.adam else []
        self.second = [torch.zeros_like(view) for view in self.views] if self.adam else []
        self.taken = 0

    def step(self, losses: Tensor) -> None:
        """Take one step down the loss of each run (runs,)."""
        gradients = torch.autograd.grad(losses.sum(), self.parameters)
        directions = [gradient.view_as(view) for gradient, view in zip(gradients, self.views, strict=True)]
        if self.adam:
            directions = self._adam_directions(directions)
        for view, direction in zip(self.views, directions, strict=True):
            view.addcmul_(direction, self.rates, value=-1)

    def _adam_directions(self, gradients: list[Tensor]) -> list[Tensor]:
        self.taken += 1
        directions = []
        for first, second, gradient in zip(self.first, self.second, gradients, strict=True):
            first.lerp_(gradient, 1 - 0.9)
            second.mul_(0.999).addcmul_(gradient, gradient, value=1 - 0.999)
            size = (second / (1 - 0.999**self.taken)).sqrt_().add_(1e-8)
            directions.append(first / (1 - 0.9**self.taken) / size)
        return directions


def _losses(task: Task, output: Tensor, y: Tensor) -> Tensor:
    """Return the loss of each row (runs, N): cross-entropy in nats, or squared error of the standardized target."""
    y = y.expand(output.shape[:2])
    if task == "regression":
        return (output.squeeze(2) - y) ** 2
    return F.cross_entropy(output.flatten(0, 1), y.flatten(), reduction="none").view(y.shape)


def row_errors(task: Task, output: Tensor, y: Tensor) -> Tensor:
    """Return the error of each row (runs, N): 1 for a wrong class and 0 for the right one, or the squared error."""
    if task == "regression":
        return _losses(task, output, y)
    return (output.argmax(2) != y).to(output.dtype)


class Trainer:
    """Trainer of a stack: its networks, their data and their state, advanced one gradient step at a time."""

    def __init__(
        self, dataset: Dataset, arm: Arm, learning_rates: Sequence[float], seeds: Sequence[int], settings: Settings
    ) -> None:
        self.dataset = dataset
        self.runs = len(seeds)
        standardized = settings.inputs == "standardized"
        self.parts: dict[PartName, LabeledRows] = {
            name: LabeledRows(*map(torch.from_numpy, dataset.part(name, standardized=standardized))) for name in PARTS
        }
        x = self.parts["train"].x
        self.network = MLP(
            x.shape[1],
            settings.hidden,
            dataset.outputs,
            activation=settings.activation,
            placement=PLACEMENTS[settings.null_arm or arm],
            runs=self.runs,
        ).to(x.dtype)
        self.network.initialize(
            [_generator(settings, arm, seed, 0) for seed in seeds], settings.init, settings.init_scale
        )
        self.batches = _batches([_generator(settings, arm, seed, 1) for seed in seeds], len(x), settings.batch_size)
        self.descent = _GradientDescent(self.network, settings.optimizer, learning_rates)

    def step(self) -> Tensor:
        """Take one gradient step on the next mini-batch of each run; return the losses before it (runs,)."""
        x, y = self.parts["train"]
        rows = next(self.batches)
        self.network.train()
        losses = _losses(self.dataset.task, self.network(x[rows]), y[rows]).mean(1)
        self.descent.step(losses)
        return losses.detach()

    def errors(self, part: PartName) -> tuple[Tensor, Tensor]:
        """Return loss and error of each row of a part (runs, N), with the running statistics."""
        return self.errors_on(*self.parts[part])

    @torch.no_grad()
    def errors_on(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Return loss and error of each of the given rows (runs, N), with the running statistics."""
        self.network.eval()
        widest = max(x.shape[1], *(linear.weight.shape[2] for linear in self.network.linears()))
        rows = max(1, NUMBERS_AT_ONCE // (self.runs * widest))
        losses, errors = [], []
        for some_x, some_y in zip(torch.split(x, rows), torch.split(y, rows), strict=True):
            output = self.network(some_x)
            losses.append(_losses(self.dataset.task, output, some_y))
            errors.append(row_errors(self.dataset.task, output, some_y))
        return torch.cat(losses, 1), torch.cat(errors, 1)

    def score(self, errors: Tensor, part: PartName) -> Tensor:
        """Return accuracy, or R squared, of each run in float64, given the errors of the rows of a part."""
        return self.score_on(errors, self.parts[part].y)

    def score_on(self, errors: Tensor, y: Tensor) -> Tensor:
        """Return accuracy, or R squared, of each run in float64, given the errors of rows with targets y."""
        rows = errors.shape[1]
        total = errors.double().sum(1)
        if self.dataset.task == "classification":
            return (rows - total) / rows  # exactly the float that a target of k / rows is
        return 1 - total / ((y.double() - y.double().mean()) ** 2).sum()

    def spaced_rows(self, part: PartName, limit: int) -> LabeledRows:
        """Return at most ``limit`` rows of a part, evenly spaced."""
        x, y = self.parts[part]
        chosen = torch.from_numpy(np.linspace(0, len(x) - 1, min(limit, len(x))).round().astype(np.int64))
        return LabeledRows(x[chosen], y[chosen])

    @contextmanager
    def batch_statistics(self) -> Iterator[None]:
        """Normalize with the statistics of the batch, as in training, and leave the running statistics as they are."""
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
        """Return the gradient of each run's mean loss on the given rows, a view (runs, numbers) per parameter."""
        with self.batch_statistics():
            losses = _losses(self.dataset.task, self.network(x), y).mean(1)
        gradients = torch.autograd.grad(losses.sum(), self.descent.parameters)
        return [gradient.view(self.runs, -1) for gradient in gradients]
