"""Recorders: observers of a stack in training, which keep the records that the claims are measured from."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from batchnorm.lab.training.records import (
    GapRecord,
    LossChangeRecord,
    NoiseRecord,
    RecordName,
    Records,
    ShiftRecord,
)
from batchnorm.lab.training.runs import evaluation_steps, rounded
from batchnorm.lab.training.settings import Settings
from batchnorm.lab.training.trainer import Trainer
from batchnorm.statistics.distance import symmetrized_kl

__all__ = ["QUANTILES", "RECORDERS", "STEP_SIZES", "Recorder", "noise_batch_sizes", "probe_steps"]

MAX_ROWS = 5000
PROBES = 24
PROBED_ROWS = 240
DRAWN_ROWS = 60
QUANTILES = 41
STEP_SIZES = (0.5, 1.0, 2.0)
NOISE_DRAWS = 200


class Recorder(Protocol):
    """Observer of the networks of a stack before and after each gradient step, which changes nothing in them."""

    def before(self, step: int) -> None:
        """Observe the networks before a step is taken."""

    def after(self, step: int, losses: Tensor) -> None:
        """Observe the networks after a step, whose mini-batches had these losses."""

    def store(self, run: int, records: Records) -> None:
        """Store the record of a run."""


def probe_steps(steps: int) -> list[int]:
    """Return at most 24 of the evaluations, evenly spaced in the logarithm of the step, with the first and the last.

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
    """Return the powers of 2 from 4 to half of the rows.

    >>> noise_batch_sizes(60)
    [4, 8, 16]
    """
    return [2**power for power in range(2, 11) if 2**power <= rows / 2]


def _nested(values: Tensor | NDArray[Any]) -> Any:
    """Return an array as nested lists of numbers of six digits."""

    def short(value: Any) -> Any:
        return [short(item) for item in value] if isinstance(value, list) else rounded(value)

    return short(values.tolist())


class LossChangeRecorder:
    """Records the mean absolute change of the mini-batch loss from step to step."""

    def __init__(self, trainer: Trainer, settings: Settings) -> None:
        self.evaluate_at = set(evaluation_steps(settings.steps))
        self.last = torch.full((trainer.runs,), math.nan)
        self.changes: list[Tensor] = []
        self.means: list[Tensor] = []

    def before(self, step: int) -> None:
        """Do nothing."""

    def after(self, step: int, losses: Tensor) -> None:
        """Compare the loss with that of the previous step."""
        self.changes.append((losses - self.last).abs())
        self.last = losses
        if step in self.evaluate_at:
            self.means.append(torch.stack(self.changes).mean(0))
            self.changes = []

    def store(self, run: int, records: Records) -> None:
        """Store the means."""
        records.loss_change = LossChangeRecord([rounded(float(mean[run])) for mean in self.means])


class GapRecorder:
    """Records loss and score on the training rows and score on the test rows, and the noise of batch statistics."""

    def __init__(self, trainer: Trainer, settings: Settings) -> None:
        self.trainer = trainer
        self.evaluate_at = set(evaluation_steps(settings.steps))
        self.train, self.test = (trainer.spaced_rows(part, MAX_ROWS) for part in ("train", "test"))
        self.seen: list[tuple[Tensor, Tensor, Tensor]] = []

    def before(self, step: int) -> None:
        """Do nothing."""

    def after(self, step: int, losses: Tensor) -> None:
        """Evaluate both parts with the running statistics, as at inference."""
        if step not in self.evaluate_at:
            return
        row_losses, errors = self.trainer.errors_on(*self.train)
        _, test_errors = self.trainer.errors_on(*self.test)
        scores = (self.trainer.score_on(errors, self.train[1]), self.trainer.score_on(test_errors, self.test[1]))
        self.seen.append((row_losses.mean(1), *scores))

    def store(self, run: int, records: Records) -> None:
        """Store the values of each evaluation, and the noise for the first run."""
        loss, score, test_score = (
            [rounded(float(values[run])) for values in column] for column in zip(*self.seen, strict=True)
        )
        records.gap = GapRecord(loss, score, test_score, noise=self._noise() if run == 0 else None)

    @torch.no_grad()
    def _noise(self) -> NoiseRecord:
        """Measure the noise of a mini-batch's statistics: root mean square over units and random mini-batches.

        The values are the inputs of the last hidden nonlinearity. Rows are drawn without replacement.
        """
        with self.trainer.batch_statistics():
            inputs, _ = _activations(self.trainer, self.train[0])
        values = inputs[-1][0].double()
        values = values[:, values.std(0) > 0]
        standardized = (values - values.mean(0)) / values.std(0, correction=0)
        generator = torch.Generator().manual_seed(0)
        sizes = noise_batch_sizes(len(values))
        means, deviations = [], []
        for size in sizes:
            drawn = [torch.randperm(len(values), generator=generator)[:size] for _ in range(NOISE_DRAWS)]
            batches = standardized[torch.stack(drawn)]
            means.append(batches.mean(1).square().mean().sqrt())
            deviations.append((batches.std(1, correction=0) - 1).square().mean().sqrt())
        return NoiseRecord(
            batch_sizes=sizes,
            mean=[rounded(float(mean)) for mean in means],
            sd=[rounded(float(deviation)) for deviation in deviations],
        )


def _activations(trainer: Trainer, x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Return the inputs of each hidden nonlinearity and the outputs of each hidden layer, (runs, N, units) each."""
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


class ShiftRecorder:
    """Records how far one step moves the inputs of each layer, and how much the gradient changes along itself."""

    def __init__(self, trainer: Trainer, settings: Settings) -> None:
        self.trainer = trainer
        self.probes = set(probe_steps(settings.steps))
        self.x, self.y = trainer.spaced_rows("train", PROBED_ROWS)
        self.old: list[tuple[Tensor, Tensor]] = []
        self.drifts: list[Tensor] = []
        self.changes: list[Tensor] = []
        self.distributions: list[list[list[float]]] = []
        self.outputs: list[list[list[float]]] = []

    def before(self, step: int) -> None:
        """Record the distributions and the changes of the gradient before the step of a probe."""
        if step not in self.probes:
            return
        inputs, outputs = self._observe()
        self.old = self._moments(outputs)
        levels = np.linspace(0, 1, QUANTILES)
        with np.errstate(invalid="ignore"):  # a diverged run has infinite values
            self.distributions.append([_nested(np.quantile(values[0].numpy(), levels)) for values in inputs])
        middle = outputs[(len(outputs) - 1) // 2]
        self.outputs.append(_nested(middle[0, :DRAWN_ROWS, :2]))
        self.changes.append(self._gradient_changes())

    def after(self, step: int, losses: Tensor) -> None:
        """Record the drift of each layer's inputs in the step of a probe: the median over its inputs."""
        if step not in self.probes:
            return
        _, outputs = self._observe()
        drifts = [
            symmetrized_kl(*old, *new).median(1).values
            for old, new in zip(self.old, self._moments(outputs), strict=True)
        ]
        self.drifts.append(torch.stack(drifts))

    def store(self, run: int, records: Records) -> None:
        """Store the values of each probe, and the distributions for the first run."""
        records.shift = ShiftRecord(
            drift=_nested(torch.stack(self.drifts)[:, :, run]),
            gradient_change=_nested(torch.stack(self.changes)[:, :, run]),
            distributions=self.distributions if run == 0 else None,
            outputs=self.outputs if run == 0 else None,
        )

    @torch.no_grad()
    def _observe(self) -> tuple[list[Tensor], list[Tensor]]:
        with self.trainer.batch_statistics():
            return _activations(self.trainer, self.x)

    def _moments(self, outputs: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
        """Return mean and variance (runs, units) of the outputs of each layer, which are the inputs of the next."""
        wide = [output.double() for output in outputs]
        return [(values.mean(1), values.var(1, correction=0)) for values in wide]

    def _gradient_changes(self) -> Tensor:
        """Return || gradient after a step along itself - gradient || / || gradient ||, (step sizes, runs).

        Step sizes are in units of the learning rate, as in Santurkar et al. (2018), section 3.2; the rows are the same
        at every probe.
        """
        descent = self.trainer.descent
        gradients = self.trainer.gradients(self.x, self.y)
        start = [view.clone() for view in descent.views]
        length = torch.cat(gradients, 1).double().norm(dim=1)
        changes = []
        for size in STEP_SIZES:
            for view, old, gradient in zip(descent.views, start, gradients, strict=True):
                view.copy_(old - size * descent.rates * gradient)
            ahead = self.trainer.gradients(self.x, self.y)
            for view, old in zip(descent.views, start, strict=True):
                view.copy_(old)
            difference = torch.cat([a - b for a, b in zip(ahead, gradients, strict=True)], 1).double()
            changes.append(difference.norm(dim=1) / length)
        return torch.stack(changes)


RECORDERS: dict[RecordName, Callable[[Trainer, Settings], Recorder]] = {
    "loss_change": LossChangeRecorder,
    "gap": GapRecorder,
    "shift": ShiftRecorder,
}
