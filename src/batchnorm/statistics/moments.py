"""Count, mean and sum of squared deviations of each channel, from which statistics are pooled exactly."""

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
    """Moments of the values of each channel; merging equals computing them from all values at once.

    The formulas are those of Chan, Golub & LeVeque (1979). Merging is associative and commutative up to rounding, and
    moments of no values are its neutral element.

    Attributes
    ----------
    count : Tensor, float64
        Number of values per channel, a scalar.
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
        """Return the moments of no values, the neutral element of `merge`."""
        zeros = torch.zeros(channels, dtype=torch.float64, device=device)
        return cls(torch.zeros((), dtype=torch.float64, device=device), zeros, zeros.clone())

    @classmethod
    @torch.no_grad()
    def of(cls, x: Tensor, channel_dim: int = 1, mask: Tensor | None = None) -> Moments:
        """Return the moments of a batch of any floating dtype.

        Parameters
        ----------
        x : Tensor
            At least 2 dimensions.
        channel_dim : int
            The dimension of the channels.
        mask : Tensor or None, bool
            The shape of x without the channels, where each size may also be 1; True where a value counts.

        Raises
        ------
        InputError
            x has fewer than 2 dimensions or an integer dtype, or the mask does not fit x.
        """
        if x.dim() < 2 or not -x.dim() <= channel_dim < x.dim():
            raise InputError(
                f"x must have at least 2 dimensions, and channel_dim={channel_dim} must be one of them; got x of "
                f"shape {tuple(x.shape)}"
            )
        x = x.movedim(channel_dim, 1)
        check(x, None, mask)
        return cls.of_batch(ops.moments(x, mask))

    @classmethod
    def of_batch(cls, batch: BatchMoments) -> Moments:
        """Return the mean, biased variance and count of a batch, which the kernels compute, as moments."""
        mean = batch.mean.double()
        count = torch.as_tensor(batch.count, dtype=torch.float64, device=mean.device)
        return cls(count, mean, batch.var.double() * count)

    def var(self, *, unbiased: bool = False) -> Tensor:
        """Return the variance (C,); it is 0 for no values, and the unbiased one is 0 for one value too."""
        return self.m2 / (self.count - 1 if unbiased else self.count).clamp(min=1)

    def merge(self, other: Moments) -> Moments:
        """Return the moments of the values of both.

        Raises
        ------
        InputError
            The other moments have another number of channels.
        """
        return merged((self, other))

    def all_reduce(self, group: dist.ProcessGroup | None = None) -> Moments:
        """Return the moments of the values of all processes in the group, by one collective.

        Every process gets the same bits. Without torch.distributed, and in a process outside of the group, there is one
        process.
        """
        if group_size(group) == 1:
            return self
        packed = torch.cat((self.count.reshape(1), self.mean, self.m2))
        channels = len(self.mean)
        return merged(
            [Moments(each[0], each[1 : channels + 1], each[channels + 1 :]) for each in all_gather(packed, group)]
        )


def merged(parts: Sequence[Moments]) -> Moments:
    """Return the moments of the values of all parts.

    Raises
    ------
    InputError
        There are no parts, or they have different numbers of channels.
    """
    sizes = sorted({len(part.mean) for part in parts})
    if len(sizes) != 1:
        raise InputError(f"moments must have the same number of channels to be merged; got {sizes}")
    counts = torch.stack([part.count for part in parts])
    means, m2 = torch.stack([part.mean for part in parts]), torch.stack([part.m2 for part in parts])
    var = m2 / counts.clamp(min=1).unsqueeze(1)
    return Moments.of_batch(reference.pooled(BatchMoments(means, var, counts)))
