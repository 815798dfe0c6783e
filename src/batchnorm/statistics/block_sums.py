"""Sums over a loader of what blocks of samples add to the moments of the layers' inputs, in bounded memory."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from batchnorm import ops
from batchnorm.errors import InputError
from batchnorm.nn.running import active_set, epsilon_of
from batchnorm.statistics.batches import BatchReader
from batchnorm.statistics.forwards import restored, uncompiled, with_input_hook
from batchnorm.statistics.interrupts import allow_interrupts, defer_interrupts
from batchnorm.statistics.layers import Layers
from batchnorm.torch_internals import TorchBatchNorm

__all__ = ["BlockSums", "InputSums", "standardization", "sum_inputs"]

MIN_SAMPLES, MAX_BLOCKS = 8, 512


@dataclass
class BlockSums:
    """Sums over the standardized inputs of a layer, per block of consecutive samples.

    With u the input in units of the stored statistics, a block has the sums of u and of u^2 less its stored mean, for
    each channel, and the number of values per channel.

    Attributes
    ----------
    sums : Tensor, shape (blocks, 2 C)
    counts : Tensor, shape (blocks,)
    """

    sums: Tensor
    counts: Tensor

    def mean(self) -> Tensor:
        """Return the means (2 C,) over all values."""
        return self.sums.sum(0) / self.counts.sum()

    def squared_error(self) -> Tensor:
        """Return the squared standard error (C,) of the mean of u."""
        return self._deviations()[:, : self.sums.shape[1] // 2].square().sum(0)

    def null_draws(self, normal: Tensor) -> Tensor:
        """Return draws (B,) of the mean square of the means if these were 0, from normal numbers (B, blocks)."""
        deviations = self._deviations()
        products = deviations @ deviations.T / deviations.shape[1]
        return ((normal @ products) * normal).sum(1)

    def _deviations(self) -> Tensor:
        """Return the deviations (blocks, 2 C) of what blocks add to the mean; their squares sum to its squared error.

        A block's share of the mean lowers its own deviation from that mean, which the denominator corrects.
        """
        share = self.counts / self.counts.sum()
        deviations = self.sums / self.counts.sum() - share.unsqueeze(1) * self.mean()
        return deviations / (1 - share.square().sum()).clamp(min=1e-9).sqrt()

    def extended(self, other: BlockSums, blocks: Tensor) -> BlockSums:
        """Return these with the rows of another added, each to the block whose number is given."""
        every = torch.cat((torch.arange(len(self.counts)), blocks))
        return _summed(torch.cat((self.sums, other.sums)), torch.cat((self.counts, other.counts)), every)

    def merged_in_pairs(self) -> BlockSums:
        """Return these with each two neighbors merged; a last block without a neighbor stays."""
        return _summed(self.sums, self.counts, torch.arange(len(self.counts)) // 2)


def _summed(sums: Tensor, counts: Tensor, blocks: Tensor, number: int | None = None) -> BlockSums:
    """Sum rows into the block that each belongs to."""
    number = int(blocks.max()) + 1 if number is None else number
    return BlockSums(
        sums.new_zeros(number, sums.shape[1]).index_add_(0, blocks, sums),
        counts.new_zeros(number).index_add_(0, blocks, counts),
    )


class InputSums(NamedTuple):
    """The sums of each layer that was used, in order of use, and the number of samples."""

    layers: dict[str, BlockSums]
    samples: int


def sum_inputs(
    reader: BatchReader,
    layers: Layers,
    loader: Iterable[Any],
    *,
    name: str,
    max_samples: int | None = None,
) -> InputSums:
    """Run the reader's model in eval mode over a loader, and sum the inputs of its layers.

    Raises
    ------
    InputError
        There are too few samples for a test, or inputs are not finite; ``name`` is what the message calls the loader.
    """
    scales = {path: standardization(layer) for path, layer in layers.items()}
    sums: dict[str, BlockSums] = {}
    of_batch: dict[str, BlockSums] = {}
    samples, blocks, samples_per_block, batch_size = 0, 0, 1, 0

    def add(path: str, x: Tensor, mask: Tensor | None) -> None:
        reader.check_rows(x.shape[0])
        if x.numel() and batch_size:
            rows, counts = _row_sums(x, mask, *scales[path])
            sample = torch.arange(len(counts)) * batch_size // len(counts)  # a sample may have several rows
            added = _summed(rows, counts, sample, batch_size)
            if path in of_batch:  # the layer is used several times
                added = BlockSums(added.sums + of_batch[path].sums, added.counts + of_batch[path].counts)
            of_batch[path] = added

    with (
        defer_interrupts(),
        torch.no_grad(),
        uncompiled(),
        restored(reader.model),
        with_input_hook(layers, add),
        allow_interrupts(),
    ):
        reader.model.eval()
        for batch in loader:
            of_batch.clear()
            batch_size = reader.count(batch)
            reader.run(batch)
            if batch_size == 0:
                continue
            numbers = (samples + torch.arange(batch_size)) // samples_per_block
            for path in sums | of_batch:
                channels = active_set(layers[path]).mean.numel()
                before = sums.get(path) or _zeros(blocks, channels)
                sums[path] = before.extended(of_batch.get(path) or _zeros(batch_size, channels), numbers)
            samples, blocks = samples + batch_size, int(numbers[-1]) + 1
            while blocks > MAX_BLOCKS:
                sums = {path: each.merged_in_pairs() for path, each in sums.items()}
                blocks, samples_per_block = (blocks + 1) // 2, samples_per_block * 2
            if max_samples is not None and samples >= max_samples:
                break
    if samples < MIN_SAMPLES or not sums:
        raise InputError(
            f"{name} must bring at least {MIN_SAMPLES} samples to the layers, to tell a shift from chance; "
            f"got {samples}"
        )
    for path, each in sums.items():
        if not each.mean().isfinite().all():
            raise InputError(f"the inputs of {path or 'the layer'} must be finite; got NaN or infinite values")
    return InputSums(sums, samples)


def _zeros(blocks: int, channels: int) -> BlockSums:
    return BlockSums(torch.zeros(blocks, 2 * channels, dtype=torch.float64), torch.zeros(blocks, dtype=torch.float64))


def _row_sums(x: Tensor, mask: Tensor | None, mean: Tensor, scale: Tensor, stored: Tensor) -> tuple[Tensor, Tensor]:
    """Return the sums (N, 2 C) over each row of x (N, C, *), and the counts (N,)."""
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


def standardization(layer: TorchBatchNorm) -> tuple[Tensor, Tensor, Tensor]:
    """Return the running mean, sqrt(var + eps), and the running variance in units of its square, (C,) float64."""
    running = active_set(layer)
    mean, var = (values.detach().cpu().double() for values in (running.mean, running.var))
    eps = epsilon_of(layer)
    return mean, (var + eps).sqrt(), var / (var + eps)
