"""Count, mean and sum of squared deviations of each channel: what statistics are pooled from, exactly."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from batchnorm import ops
from batchnorm.checks import check
from batchnorm.errors import InputError
from batchnorm.kernels import reference
from batchnorm.kernels.records import BatchMoments
from batchnorm.processes import all_gather, group_size

__all__ = ["Moments"]


@dataclass(frozen=True, eq=False)
class Moments:
    """Moments of some values of each channel, which merge with those of others as if all had been seen at once.

    Chan, Golub & LeVeque (1979). Merging is associative and commutative within rounding; moments of no values change
    nothing.

    Attributes
    ----------
    count : Tensor, float64
        How many values each channel has, a scalar.
    mean : Tensor, shape (C,), float64
    m2 : Tensor, shape (C,), float64
        Sum of squared deviations from the mean.

    Examples
    --------
    >>> import batchnorm as bn, torch
    >>> x = torch.tensor([[1.0], [3.0], [2.0], [6.0]])
    >>> both = bn.Moments.of(x[:2]).merge(bn.Moments.of(x[2:]))
    >>> both.count.item(), both.mean.item(), both.m2.item(), both.var().item()
    (4.0, 3.0, 14.0, 3.5)
    """

    count: Tensor
    mean: Tensor
    m2: Tensor

    @classmethod
    def empty(cls, channels: int, device: torch.device | str | None = None) -> Moments:
        """Of no values: neutral in `merge`."""
        zeros = torch.zeros(channels, dtype=torch.float64, device=device)
        return cls(torch.zeros((), dtype=torch.float64, device=device), zeros, zeros.clone())

    @classmethod
    @torch.no_grad()
    def of(cls, x: Tensor, channel_dim: int = 1, mask: Tensor | None = None) -> Moments:
        """Of a batch, of any floating dtype; the mask, of x's shape without the channels, is True where a value counts.

        Raises
        ------
        InputError
            x has fewer than 2 dimensions or no floating dtype, the mask another shape.
        """
        if x.dim() < 2 or not -x.dim() <= channel_dim < x.dim():
            raise InputError(f"channel_dim={channel_dim} must be a dimension of x, of 2 or more; got {tuple(x.shape)}")
        x = x.movedim(channel_dim, 1)
        check(x, None, mask)
        return cls.of_batch(ops.moments(x, mask))

    @classmethod
    def of_batch(cls, batch: BatchMoments) -> Moments:
        """From mean, biased variance and count, as the layers have them."""
        mean = batch.mean.double()
        count = torch.as_tensor(batch.count, dtype=torch.float64, device=mean.device)
        return cls(count, mean, batch.var.double() * count)

    def var(self, *, unbiased: bool = False) -> Tensor:
        """Variance (C,); of no values 0, and unbiased of one value too."""
        return self.m2 / (self.count - 1 if unbiased else self.count).clamp(min=1)

    def merge(self, other: Moments) -> Moments:
        """Of the values of both.

        Raises
        ------
        InputError
            The other has another number of channels.
        """
        return merged((self, other))

    def all_reduce(self, group: dist.ProcessGroup | None = None) -> Moments:
        """Of the values of all ranks of the group, one collective; every rank ends with the same, to the bit.

        Where torch.distributed is not initialised, and outside of the group, there is one rank.
        """
        if group_size(group) == 1:
            return self
        packed = torch.cat((self.count.reshape(1), self.mean, self.m2))
        channels = len(self.mean)
        return merged(
            [Moments(each[0], each[1 : channels + 1], each[channels + 1 :]) for each in all_gather(packed, group)]
        )


def merged(parts: Sequence[Moments]) -> Moments:
    """Of the values of all parts.

    Raises
    ------
    InputError
        There is none, or they have different numbers of channels.
    """
    sizes = sorted({len(part.mean) for part in parts})
    if len(sizes) != 1:
        raise InputError(f"moments must have the same number of channels to be merged; got {sizes}")
    counts = torch.stack([part.count for part in parts])
    means, m2 = torch.stack([part.mean for part in parts]), torch.stack([part.m2 for part in parts])
    var = m2 / counts.clamp(min=1).unsqueeze(1)
    return Moments.of_batch(reference.pooled(BatchMoments(means, var, counts)))
