"""What the samples of a loader, each as a whole, add to the moments of the layers' inputs, in bounded memory."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from batchnorm import ops
from batchnorm.errors import InputError
from batchnorm.statistics.forwards import (
    Forward,
    forward_pass,
    inputs_of,
    restored,
    running_statistics,
    samples_of,
    uncompiled,
)
from batchnorm.statistics.interrupts import held_back, let_through
from batchnorm.torch_internals import TorchBatchNorm

__all__ = ["Seen", "Units", "scaled_statistics", "seen_by"]

FEWEST, MOST = 8, 512


@dataclass
class Units:
    """What a layer's inputs add up to in each unit, a sample or several that follow each other.

    Sums over a unit's values of u and of u^2 less its stored mean (U, 2 C), and how many values they are (U,).
    """

    sums: Tensor
    counts: Tensor

    def mean(self) -> Tensor:
        """Over all values (2 C,)."""
        return self.sums.sum(0) / self.counts.sum()

    def error(self) -> Tensor:
        """The squared standard error of the mean of u (C,)."""
        return self._deviations()[:, : self.sums.shape[1] // 2].square().sum(0)

    def by_chance(self, normal: Tensor) -> Tensor:
        """Draws (B,) of the mean of squares of the mean, were it 0, from normal numbers (B, U)."""
        deviations = self._deviations()
        products = deviations @ deviations.T / deviations.shape[1]
        return ((normal @ products) * normal).sum(1)

    def _deviations(self) -> Tensor:
        """What each unit adds to the mean beyond the mean, such that squares add up to the mean's squared error."""
        share = self.counts / self.counts.sum()
        away = self.sums / self.counts.sum() - share.unsqueeze(1) * self.mean()
        # A unit's own part of the mean takes as much from its deviation.
        return away / (1 - share.square().sum()).clamp(min=1e-9).sqrt()

    def extended(self, other: Units, at: Tensor) -> Units:
        """By the units of another, each added to the one that ``at`` says, from the last of these on."""
        every = torch.cat((torch.arange(len(self.counts)), at))
        return _summed(torch.cat((self.sums, other.sums)), torch.cat((self.counts, other.counts)), every)

    def halved(self) -> Units:
        """Each two neighbours made one; a last one without a neighbour stays."""
        return _summed(self.sums, self.counts, torch.arange(len(self.counts)) // 2)


def _summed(sums: Tensor, counts: Tensor, at: Tensor, units: int | None = None) -> Units:
    """What rows add up to in the unit that each belongs to."""
    units = int(at.max()) + 1 if units is None else units
    return Units(
        sums.new_zeros(units, sums.shape[1]).index_add_(0, at, sums), counts.new_zeros(units).index_add_(0, at, counts)
    )


class Seen(NamedTuple):
    """What the layers saw of a loader, in the order of their use, and of how many samples."""

    units: dict[str, Units]
    samples: int


def seen_by(
    model: nn.Module,
    layers: dict[str, TorchBatchNorm],
    loader: Iterable[Any],
    forward: Forward | None,
    max_samples: int | None,
    whose: str,
) -> Seen:
    """Run the model in eval mode over a loader; what its layers see, and of how many samples.

    Raises
    ------
    InputError
        Too few samples to tell anything, or inputs that are not finite; ``whose`` they are begins the sentence.
    """
    scaled = {path: scaled_statistics(layer) for path, layer in layers.items()}
    seen: dict[str, Units] = {}
    batch_units: dict[str, Units] = {}
    samples, units, in_unit, size = 0, 0, 1, 0

    def add(path: str, x: Tensor, mask: Tensor | None) -> None:
        if x.numel() and size:
            sums, counts = _of_rows(x, mask, *scaled[path])
            at = torch.arange(len(counts)) * size // len(counts)  # rows of a sample, where they are more, follow it
            found = _summed(sums, counts, at, size)
            if path in batch_units:  # used twice
                found = Units(found.sums + batch_units[path].sums, found.counts + batch_units[path].counts)
            batch_units[path] = found

    with held_back(), torch.no_grad(), uncompiled(), restored(model), inputs_of(layers, add), let_through():
        model.eval()
        for batch in loader:
            batch_units.clear()
            size = samples_of(batch)
            forward_pass(model, batch, forward)
            if size == 0:
                continue
            at = (samples + torch.arange(size)) // in_unit
            for path in seen | batch_units:
                channels = layers[path].num_features
                old = seen.get(path) or _nothing(units, channels)
                seen[path] = old.extended(batch_units.get(path) or _nothing(size, channels), at)
            samples, units = samples + size, int(at[-1]) + 1
            while units > MOST:
                seen = {path: each.halved() for path, each in seen.items()}
                units, in_unit = (units + 1) // 2, in_unit * 2
            if max_samples is not None and samples >= max_samples:
                break
    if samples < FEWEST or not seen:
        raise InputError(
            f"{whose} must give at least {FEWEST} samples to the layers, to tell a shift from chance; got {samples}"
        )
    for path, each in seen.items():
        if not each.mean().isfinite().all():
            raise InputError(f"the inputs of {path or 'the layer'} must be finite to be compared; got others")
    return Seen(seen, samples)


def _nothing(units: int, channels: int) -> Units:
    return Units(torch.zeros(units, 2 * channels, dtype=torch.float64), torch.zeros(units, dtype=torch.float64))


def _of_rows(x: Tensor, mask: Tensor | None, mean: Tensor, scale: Tensor, stored: Tensor) -> tuple[Tensor, Tensor]:
    """Sums (N, 2 C) over each row of x (N, C, *), and counts (N,)."""
    rows, channels = x.shape[:2]
    if mask is None:
        found = ops.moments(x.reshape(1, rows * channels, -1))
        means, variances, counts = found.mean, found.var, torch.full((rows,), x.numel() // (rows * channels))
    else:
        mask = mask.expand(rows, *x.shape[2:])
        each = [ops.moments(x[i : i + 1], mask[i : i + 1]) for i in range(rows)]
        means, variances = torch.stack([one.mean for one in each]), torch.stack([one.var for one in each])
        counts = torch.stack([torch.as_tensor(one.count) for one in each])
    means, variances = (values.view(rows, channels).cpu().double() for values in (means, variances))
    u = (means - mean) / scale
    v = variances / scale**2 + u * u - stored
    counts = counts.cpu().double()
    return torch.cat((u, v), 1) * counts.unsqueeze(1), counts


def scaled_statistics(layer: TorchBatchNorm) -> tuple[Tensor, Tensor, Tensor]:
    """Running mean, sqrt(var + eps), and the running variance in units of its square, (C,) float64."""
    mean, var = (values.detach().cpu().double() for values in running_statistics(layer))
    return mean, (var + layer.eps).sqrt(), var / (var + layer.eps)
