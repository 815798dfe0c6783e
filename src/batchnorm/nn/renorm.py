"""Batch renormalization: the normalized batch is corrected towards the running statistics, within limits.

Ioffe (2017), "Batch Renormalization: Towards Reducing Minibatch Dependence in Batch-Normalized Models". The layer uses
``r * x_hat + d`` instead of x_hat, with r and d as in `batchnorm.kernels.reference.renorm_correction`. Within the
limits this equals ``(x - running mean) / running deviation``, which the layer computes in eval.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass

import torch
from torch import Tensor

from batchnorm.checks import is_real, is_whole
from batchnorm.errors import InputError
from batchnorm.kernels.native import are_unwrapped
from batchnorm.kernels.records import BatchMoments, Limits
from batchnorm.kernels.reference import statistics_dtype

__all__ = ["FirstRuns", "Renorm", "RenormSchedule"]


@dataclass(frozen=True)
class Renorm:
    """Fixed limits of batch renormalization: r from 1 / r_max to r_max, d from -d_max to d_max.

    Parameters
    ----------
    r_max : float
        At least 1; with 1 the deviation is that of the batch.
    d_max : float
        At least 0; with 0 the mean is that of the batch.

    Raises
    ------
    InputError
        A limit is out of its range.

    Examples
    --------
    >>> import batchnorm as bn
    >>> bn.BatchNorm1d(3, renorm=bn.Renorm(3.0, 5.0)).renorm
    Renorm(r_max=3.0, d_max=5.0)
    """

    r_max: float
    d_max: float

    def __post_init__(self) -> None:
        if not is_real(self.r_max) or not 1 <= self.r_max < math.inf:
            raise InputError(f"r_max must be finite and at least 1; got {self.r_max!r}")
        if not is_real(self.d_max) or not 0 <= self.d_max < math.inf:
            raise InputError(f"d_max must be finite and at least 0; got {self.d_max!r}")
        _set(self, float, "r_max", "d_max")

    def limits(self, batches: Tensor) -> Limits:
        """Return the limits, which are the same after any number of batches."""
        return Limits(self.r_max, self.d_max)


@dataclass(frozen=True)
class RenormSchedule:
    """Limits that widen during training; the defaults are those of Ioffe (2017), section 4.1.

    Up to batch ``start`` the layer does ordinary batch normalization, since the running statistics are not reliable
    yet. Then the limit of r grows linearly from 1 to ``r_max`` at batch ``r_end``, and the limit of d from 0 to
    ``d_max`` at batch ``d_end``. Batches are counted by the layer's ``num_batches_tracked``.

    Raises
    ------
    InputError
        A limit is out of its range, or an end is not after the start.

    Examples
    --------
    >>> import batchnorm as bn, torch
    >>> schedule = bn.RenormSchedule()
    >>> [tuple(round(limit, 2) for limit in schedule.limits(torch.tensor(n))) for n in (0, 5_000, 15_000, 40_000)]
    [(1.0, 0.0), (1.0, 0.0), (1.57, 2.5), (3.0, 5.0)]
    """

    r_max: float = 3.0
    d_max: float = 5.0
    start: int = 5_000
    r_end: int = 40_000
    d_end: int = 25_000

    def __post_init__(self) -> None:
        Renorm(self.r_max, self.d_max)
        for name in ("start", "r_end", "d_end"):
            if not is_whole(getattr(self, name)):
                raise InputError(f"{name} must be a whole number of batches; got {getattr(self, name)!r}")
        if not 0 <= self.start < min(self.r_end, self.d_end):
            raise InputError(
                f"start must be at least 0 and before both r_end and d_end; got start={self.start}, "
                f"r_end={self.r_end}, d_end={self.d_end}"
            )
        _set(self, float, "r_max", "d_max")
        _set(self, int, "start", "r_end", "d_end")

    def limits(self, batches: Tensor) -> Limits:
        """Return the limits after a number of batches; as tensors where reading the count would stall the device."""
        ends = self.r_end, self.d_end
        if torch.compiler.is_compiling() or batches.device.type != "cpu" or not are_unwrapped(batches):
            counted = batches.to(statistics_dtype(batches))
            r, d = (((counted - self.start) / (end - self.start)).clamp(0, 1) for end in ends)
        else:
            seen = int(batches)
            r, d = (min(max((seen - self.start) / (end - self.start), 0.0), 1.0) for end in ends)  # type: ignore[assignment]
        return Limits(1 + r * (self.r_max - 1), d * self.d_max)  # type: ignore[arg-type]


def _set(limits: Renorm | RenormSchedule, kind: type, *names: str) -> None:
    """Convert numbers of NumPy, which torch.compile does not accept, to numbers of Python."""
    for name in names:
        object.__setattr__(limits, name, kind(getattr(limits, name)))


@dataclass
class _FirstRun:
    """A forward that may be run again, and how often it has been."""

    batch: BatchMoments
    correction: Tensor
    uses: int = 0


class FirstRuns:
    """The r and d of forwards that activation checkpointing may run again.

    A recomputed forward must use the r and d of its first run, which can no longer be computed, since the running
    statistics have been updated since. The first run is recognized by its batch: the one with the nearest moments. Of
    several runs on the same batch it is the last of those that have been recomputed least often, since a backward
    begins with the last forward.
    """

    def __init__(self) -> None:
        self._runs: deque[_FirstRun] = deque(maxlen=128)

    def keep(self, batch: BatchMoments, correction: Tensor) -> None:
        """Remember a first run, and forget those that have been recomputed."""
        if any(run.uses for run in self._runs):
            self._runs = deque((run for run in self._runs if not run.uses), self._runs.maxlen)
        self._runs.append(_FirstRun(batch, correction))

    def find(self, batch: BatchMoments) -> Tensor | None:
        """Return the r and d of the first run on this batch; None if there was none."""
        if not self._runs:
            return None

        def distance(run: _FirstRun) -> float:
            away = (run.batch.mean - batch.mean).abs() + (run.batch.var - batch.var).abs()
            return float(torch.nan_to_num(away, nan=math.inf).sum())

        first = min(reversed(self._runs), key=lambda run: (distance(run), run.uses))
        first.uses += 1
        return first.correction
