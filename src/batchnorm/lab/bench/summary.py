"""Summary of many kernel cases: geometric means over groups, and the cases with the smallest speed-up."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import geometric_mean

from batchnorm.lab.bench.registry import Case
from batchnorm.lab.bench.results import TimedCase

__all__ = ["LARGE", "Mean", "geometric_means", "slowest"]

LARGE = 10**6
"""Size of x in bytes from which a case counts in the means. Smaller ones spend much of their time on the call."""
GROUPS: tuple[Callable[[Case], str], ...] = (
    lambda case: case.mode,
    lambda case: case.operation,
    lambda case: case.dtype,
    lambda case: case.layout,
)


@dataclass(frozen=True)
class Mean:
    """Geometric means over a group of cases.

    Attributes
    ----------
    group : str
        "all", or the mode, operation, dtype or layout that the cases share.
    cases : int
    speedup : float
        Ratio of torch's time to ours.
    copies, torch_copies : float
        Our time and torch's, in copies of x.
    over_floor : float
        Ratio of our time to the floor.
    """

    group: str
    cases: int
    speedup: float
    copies: float
    torch_copies: float
    over_floor: float


def geometric_means(cases: Sequence[TimedCase]) -> list[Mean]:
    """Return the means over all large cases, then by mode, operation, dtype and layout."""
    large = [timed for timed in cases if timed.case.bytes >= LARGE]
    if not large:
        return []
    means = [_mean("all", large)]
    for group_of in GROUPS:
        for group in dict.fromkeys(group_of(timed.case) for timed in large):
            means.append(_mean(group, [timed for timed in large if group_of(timed.case) == group]))
    return means


def _mean(group: str, cases: Sequence[TimedCase]) -> Mean:
    copies = [timed.timing.copies for timed in cases]
    return Mean(
        group,
        len(cases),
        speedup=geometric_mean(timed.timing.speedup.median for timed in cases),
        copies=geometric_mean(c.ours for c in copies),
        torch_copies=geometric_mean(c.torch for c in copies),
        over_floor=geometric_mean(c.ours / c.floor for c in copies),
    )


def slowest(cases: Sequence[TimedCase], count: int = 5) -> list[TimedCase]:
    """Return the cases, of any size, with the smallest speed-ups."""
    return sorted(cases, key=lambda timed: timed.timing.speedup.median)[:count]
