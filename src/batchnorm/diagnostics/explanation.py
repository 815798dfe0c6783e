"""The report of `explain`: every number as a tensor, and the tables that show the first of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from batchnorm.reports import Block, Report, Table
from batchnorm.text import format_column

__all__ = ["Calculation", "Explanation"]

CHANNELS_SHOWN = 3
VALUES_SHOWN = 8


@dataclass(frozen=True, eq=False)
class Calculation:
    """The normalization of a batch with one pair of statistics: the batch's own, or the running ones.

    Attributes
    ----------
    mean, var, sd : Tensor, shape (C,)
        mu, the biased variance (running: as stored) and its square root.
    z_hat : Tensor, shape (N, C, *)
        ``(z - mean) / sqrt(var + eps)``.
    y : Tensor, shape (N, C, *)
        ``gamma * z_hat + beta``.
    output : Tensor, shape (N, C, *)
        The output of the layer: ``g(y)`` where it has an activation g, else ``y``.
    """

    mean: Tensor
    var: Tensor
    sd: Tensor
    z_hat: Tensor
    y: Tensor
    output: Tensor


@dataclass(frozen=True, eq=False, repr=False)
class Explanation(Report):
    """The result of `explain`.

    Attributes
    ----------
    layer : str
        The repr of the layer.
    z : Tensor, shape (N, C, *)
        The batch.
    count : int
        m, the number of values per channel.
    bound : float
        ``sqrt(m - 1)``, which no |z_hat| exceeds in training, whatever the batch holds.
    eps : float
        Added to the variance.
    gamma, beta : Tensor or None, shape (C,)
        None where the layer has none, which stands for 1 and 0.
    activation : str or None
        g, applied to y.
    training : Calculation
        With the mean and the biased variance of the batch.
    inference : Calculation or None
        With the running statistics; None where the layer keeps none and uses the batch's in eval mode too.
    unbiased_var : Tensor, shape (C,)
        ``var * m / (m - 1)``.
    momentum : float or None
        Weight of the batch in the running statistics; for a cumulative mean, one over the number of batches including
        this one. None where nothing is updated.
    new_running_mean, new_running_var : Tensor or None, shape (C,)
        Running statistics after a training step on this batch.
    unbiased : bool
        Whether the unbiased variance of the batch updates the running variance, or the biased one.
    """

    layer: str
    z: Tensor
    count: int
    bound: float
    eps: float
    gamma: Tensor | None
    beta: Tensor | None
    activation: str | None
    training: Calculation
    inference: Calculation | None
    unbiased_var: Tensor
    momentum: float | None
    new_running_mean: Tensor | None
    new_running_var: Tensor | None
    unbiased: bool

    def _summary(self) -> str:
        name = self.layer.partition("(")[0]
        return f"{name}, channels={self.z.shape[1]}, values per channel={self.count}"

    def _records(self) -> list[dict[str, Any]]:
        """Return a row per value: its channel and position, the statistics, and what the layer makes of it."""
        channels, shape = self.z.shape[1], self.z.select(1, 0).shape
        positions = [_position(number, shape) for number in range(self.count)]
        columns: dict[str, Sequence[object]] = {
            "channel": [channel for channel in range(channels) for _ in positions],
            "position": positions * channels,
            "z": _by_channel(self.z),
        }
        for prefix, calculation in (("", self.training), ("inference_", self.inference)):
            if calculation is not None:
                for name in ("mean", "var", "z_hat", "y", "output"):
                    columns[prefix + name] = _by_channel(_like(getattr(calculation, name), self.z))
        return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]

    def _blocks(self) -> Iterator[Block]:
        channels = self.z.shape[1]
        yield self.layer
        yield from self._formulas()
        for channel in range(min(channels, CHANNELS_SHOWN)):
            yield ""
            yield from self._channel(channel)
        if channels > CHANNELS_SHOWN:
            yield ""
            yield f"... and {channels - CHANNELS_SHOWN} more channels"

    def _formulas(self) -> Iterator[str]:
        output = "" if self.activation is None else f",  g = {self.activation}"
        yield f"z_hat = (z - mean) / sqrt(var + eps),  y = gamma * z_hat + beta{output}"
        yield f"m = {self.count} values per channel, so |z_hat| <= sqrt(m - 1) = {self.bound:.5g} in training"
        if self.inference is None:
            yield "no running statistics: inference uses the batch's own too"
        elif self.momentum is None:
            yield "the running statistics are not updated"
        else:
            kind = "unbiased" if self.unbiased else "biased"
            yield f"new running = running + {self.momentum:.5g} * (batch, with {kind} var - running)"

    def _channel(self, channel: int) -> Iterator[Block]:
        gamma = "1, not learned" if self.gamma is None else f"{self.gamma[channel].item():.5g}"
        beta = "0, not learned" if self.beta is None else f"{self.beta[channel].item():.5g}"
        yield f"channel {channel}   gamma = {gamma}   beta = {beta}"
        yield self._statistics(channel)
        yield ""
        yield self._values(channel)
        if self.count > VALUES_SHOWN:
            yield f"  ... and {self.count - VALUES_SHOWN} more values"

    def _statistics(self, channel: int) -> Table:
        batch = self.training
        rows: dict[str, list[Tensor | None]] = {"batch": [batch.mean, batch.var, batch.sd, self.unbiased_var]}
        if self.inference is not None:
            running = self.inference
            rows["running"] = [running.mean, running.var, running.sd, None]
        if self.momentum is not None and self.new_running_mean is not None and self.new_running_var is not None:
            rows["new running"] = [self.new_running_mean, self.new_running_var, self.new_running_var.sqrt(), None]
        columns = [
            format_column([None if values is None else values[channel].item() for values in column])
            for column in zip(*rows.values(), strict=True)
        ]
        return Table(["", "mean", "var", "sd", "unbiased var"], [list(rows), *columns], indent="  ")

    def _values(self, channel: int) -> Table:
        def first(values: Tensor) -> list[str]:
            return format_column(values.select(1, channel).flatten()[:VALUES_SHOWN].tolist())

        shape = self.z.select(1, channel).shape
        positions = [_position(number, shape) for number in range(min(self.count, VALUES_SHOWN))]
        header = ["", ""]
        columns = [["row" if len(shape) == 1 else "index", *positions], ["z", *first(self.z)]]
        for statistics, calculation in (("batch", self.training), ("running", self.inference)):
            if calculation is not None:
                header += [statistics, ""]
                columns += [["z_hat", *first(calculation.z_hat)], ["y", *first(calculation.y)]]
                if self.activation is not None:
                    header.append("")
                    columns.append(["g(y)", *first(calculation.output)])
        return Table(header, columns, indent="  ")


def _position(number: int, shape: torch.Size) -> str:
    """Return the indices of the value with this number in a channel of the shape, as text."""
    return ",".join(str(int(index)) for index in torch.unravel_index(torch.tensor(number), shape))


def _like(values: Tensor, z: Tensor) -> Tensor:
    """Return values (C,) expanded to the shape of z, and other values as they are."""
    return values if values.dim() > 1 else values.view(-1, *[1] * (z.dim() - 2)).expand_as(z)


def _by_channel(values: Tensor) -> list[float]:
    """Return values (N, C, *), one channel after the other."""
    flat: list[float] = values.movedim(1, 0).flatten().tolist()
    return flat
