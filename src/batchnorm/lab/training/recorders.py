"""What some runs keep beside their losses and scores: what the claims are measured from."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from batchnorm.lab.training.runs import evaluation_steps, rounded
from batchnorm.lab.training.settings import Settings
from batchnorm.lab.training.trainer import Trainer

__all__ = ["QUANTILES", "RECORDERS", "STEP_SIZES", "Recorder", "noise_batch_sizes", "probe_steps"]

MOST_ROWS = 5000
PROBES = 24
PROBED_ROWS = 240
DRAWN_ROWS = 60
QUANTILES = 41
STEP_SIZES = (0.5, 1.0, 2.0)
NOISE_DRAWS = 200


class Recorder(Protocol):
    """Looks at the networks of a stack before and after each gradient step; changes nothing in them."""

    def before(self, step: int) -> None:
        """Look, before the step is taken."""

    def after(self, step: int, losses: Tensor) -> None:
        """Look, after it; ``losses`` are those of its mini-batch."""

    def record(self, run: int) -> dict[str, Any]:
        """What was seen of a run, as plain values."""


def probe_steps(steps: int) -> list[int]:
    """At most 24 of the evaluations, evenly spread over the logarithm of the step, the first and the last included.

    >>> probe_steps(20)
    [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20]
    """
    evaluations = np.array(evaluation_steps(steps))
    if len(evaluations) <= PROBES:
        return [int(step) for step in evaluations]
    wanted = np.geomspace(1, steps, PROBES)
    nearest = {int(evaluations[np.abs(np.log(evaluations / step)).argmin()]) for step in wanted}
    return sorted(nearest)


def noise_batch_sizes(rows: int) -> list[int]:
    """Powers of 2 from 4 to half of the rows.

    >>> noise_batch_sizes(60)
    [4, 8, 16]
    """
    return [2**power for power in range(2, 11) if 2**power <= rows / 2]


def _plain(values: Tensor | NDArray[Any]) -> Any:
    """Nested lists of numbers of six digits."""
    nested = values.tolist()

    def short(value: Any) -> Any:
        return [short(item) for item in value] if isinstance(value, list) else rounded(value)

    return short(nested)


class LossChange:
    """Mean absolute change of the mini-batch loss from one step to the next, since the evaluation before."""

    def __init__(self, trainer: Trainer, settings: Settings) -> None:
        self.evaluate_at = set(evaluation_steps(settings.steps))
        self.last = torch.full((trainer.runs,), math.nan)
        self.changes: list[Tensor] = []
        self.means: list[Tensor] = []

    def before(self, step: int) -> None:
        """Nothing to see."""

    def after(self, step: int, losses: Tensor) -> None:
        """Compare the loss with that of the step before."""
        self.changes.append((losses - self.last).abs())
        self.last = losses
        if step in self.evaluate_at:
            self.means.append(torch.stack(self.changes).mean(0))
            self.changes = []

    def record(self, run: int) -> dict[str, Any]:
        """The means, NaN where there was no step before."""
        return {"mean": [rounded(float(mean[run])) for mean in self.means]}


class Gap:
    """Loss and score on the training rows, and score on the test rows, at each evaluation; noise of the statistics."""

    def __init__(self, trainer: Trainer, settings: Settings) -> None:
        self.trainer = trainer
        self.evaluate_at = set(evaluation_steps(settings.steps))
        self.train, self.test = (trainer.some_rows(part, MOST_ROWS) for part in ("train", "test"))
        self.seen: list[tuple[Tensor, Tensor, Tensor]] = []

    def before(self, step: int) -> None:
        """Nothing to see."""

    def after(self, step: int, losses: Tensor) -> None:
        """Evaluate both parts with the statistics that inference uses."""
        if step not in self.evaluate_at:
            return
        row_losses, errors = self.trainer.errors_on(*self.train)
        _, test_errors = self.trainer.errors_on(*self.test)
        scores = (self.trainer.score_on(errors, self.train[1]), self.trainer.score_on(test_errors, self.test[1]))
        self.seen.append((row_losses.mean(1), *scores))

    def record(self, run: int) -> dict[str, Any]:
        """A number for each evaluation; and of the first run, which stands for its arm, the noise."""
        names = ("train_loss", "train_score", "test_score")
        columns = zip(*self.seen, strict=True)
        record: dict[str, Any] = {
            name: [rounded(float(values[run])) for values in column]
            for name, column in zip(names, columns, strict=True)
        }
        return record | ({"noise": self._noise()} if run == 0 else {})

    @torch.no_grad()
    def _noise(self) -> dict[str, Any]:
        """Noise of a mini-batch's mean and deviation, in those of all rows: root mean square over units and draws.

        Of what enters the last hidden nonlinearity, on mini-batches drawn without replacement.
        """
        with self.trainer.batch_statistics():
            inputs, _ = _hidden(self.trainer, self.train[0])
        values = inputs[-1][0].double()
        values = values[:, values.std(0) > 0]
        centred = (values - values.mean(0)) / values.std(0, correction=0)
        generator = torch.Generator().manual_seed(0)
        sizes = noise_batch_sizes(len(values))
        means, deviations = [], []
        for size in sizes:
            drawn = [torch.randperm(len(values), generator=generator)[:size] for _ in range(NOISE_DRAWS)]
            batches = centred[torch.stack(drawn)]
            means.append(batches.mean(1).square().mean().sqrt())
            deviations.append((batches.std(1, correction=0) - 1).square().mean().sqrt())
        return {
            "batch_sizes": sizes,
            "mean": [rounded(float(mean)) for mean in means],
            "sd": [rounded(float(deviation)) for deviation in deviations],
        }


def _hidden(trainer: Trainer, x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """What enters each hidden nonlinearity, and what each hidden layer puts out, (runs, N, units) each."""
    inputs: list[Tensor] = []
    outputs: list[Tensor] = []
    hooks = []
    for block in trainer.network.hidden:
        nonlinearity = block.activation
        assert isinstance(nonlinearity, torch.nn.Module)
        hooks += [
            nonlinearity.register_forward_pre_hook(lambda _, arguments: inputs.append(arguments[0])),
            block.register_forward_hook(lambda _, __, output: outputs.append(output)),
        ]
    try:
        trainer.network(x)
    finally:
        for hook in hooks:
            hook.remove()
    return inputs, outputs


def symmetrised_divergence(mean: Tensor, var: Tensor, new_mean: Tensor, new_var: Tensor) -> Tensor:
    """Sum of both Kullback-Leibler divergences of two normal distributions, in nats (Jeffreys 1946).

    Of two that do not vary at all it is 0 where they agree, and infinite where they do not.
    """
    square = (new_mean - mean) ** 2
    ratio = (var + square) / new_var + (new_var + square) / var
    same = (square == 0) & (var == new_var)
    return torch.where(same, 0.0, ratio / 2 - 1)


class Shift:
    """How the inputs of the layers move in one step, and how far the gradient can be trusted along itself."""

    def __init__(self, trainer: Trainer, settings: Settings) -> None:
        self.trainer = trainer
        self.probes = set(probe_steps(settings.steps))
        self.x, self.y = trainer.some_rows("train", PROBED_ROWS)
        self.old: list[tuple[Tensor, Tensor]] = []
        self.drifts: list[Tensor] = []
        self.changes: list[Tensor] = []
        self.distributions: list[Any] = []
        self.outputs: list[Any] = []

    def before(self, step: int) -> None:
        """The distributions, and the gradient here and further along, before the step of a probe."""
        if step not in self.probes:
            return
        inputs, outputs = self._look()
        self.old = self._moments(outputs)
        levels = np.linspace(0, 1, QUANTILES)
        with np.errstate(invalid="ignore"):  # a diverged run has infinite values
            self.distributions.append([_plain(np.quantile(values[0].numpy(), levels)) for values in inputs])
        self.outputs.append(_plain(self._first_half(outputs)[0, :DRAWN_ROWS, :2]))
        self.changes.append(self._gradient_changes())

    def after(self, step: int, losses: Tensor) -> None:
        """The drift of every layer's inputs in the step of a probe: the median over its inputs (layers, runs)."""
        if step not in self.probes:
            return
        _, outputs = self._look()
        drifts = [
            symmetrised_divergence(*old, *new).median(1).values
            for old, new in zip(self.old, self._moments(outputs), strict=True)
        ]
        self.drifts.append(torch.stack(drifts))

    def record(self, run: int) -> dict[str, Any]:
        """A number for each probe; and of the first run, which stands for its arm, the distributions."""
        drift = torch.stack(self.drifts)[:, :, run]
        change = torch.stack(self.changes)[:, :, run]
        record = {"drift": _plain(drift), "gradient_change": _plain(change)}
        if run == 0:
            record |= {"distributions": self.distributions, "outputs": self.outputs}
        return record

    @torch.no_grad()
    def _look(self) -> tuple[list[Tensor], list[Tensor]]:
        with self.trainer.batch_statistics():
            return _hidden(self.trainer, self.x)

    def _moments(self, outputs: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
        """Mean and variance (runs, units) of what each layer hands to the next."""
        wide = [output.double() for output in outputs]
        return [(values.mean(1), values.var(1, correction=0)) for values in wide]

    @staticmethod
    def _first_half(outputs: list[Tensor]) -> Tensor:
        return outputs[(len(outputs) - 1) // 2]

    def _gradient_changes(self) -> Tensor:
        """|| gradient after a step along itself - gradient || / || gradient ||, (step sizes, runs).

        Step sizes in learning rates, as in Santurkar et al. (2018), section 3.2; the rows are the same throughout.
        """
        descent = self.trainer.descent
        gradients = self.trainer.gradients(self.x, self.y)
        kept = [view.clone() for view in descent.views]
        length = torch.cat(gradients, 1).double().norm(dim=1)
        changes = []
        for size in STEP_SIZES:
            for view, start, gradient in zip(descent.views, kept, gradients, strict=True):
                view.copy_(start - size * descent.rates * gradient)
            moved = self.trainer.gradients(self.x, self.y)
            for view, start in zip(descent.views, kept, strict=True):
                view.copy_(start)
            difference = torch.cat([a - b for a, b in zip(moved, gradients, strict=True)], 1).double()
            changes.append(difference.norm(dim=1) / length)
        return torch.stack(changes)


RECORDERS: dict[str, Callable[[Trainer, Settings], Recorder]] = {
    "loss_change": LossChange,
    "gap": Gap,
    "shift": Shift,
}
