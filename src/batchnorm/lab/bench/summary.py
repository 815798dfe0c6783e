"""What many cases come to: geometric means, and the worst."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import geometric_mean
from typing import Any

__all__ = ["LARGE", "Mean", "geometric_means", "timed", "worst"]

LARGE = 10**6
"""Bytes of x from which a case counts in the means; below, waking threads and calling take part of the time."""
GROUPS = ("mode", "operation", "dtype", "layout")


@dataclass(frozen=True)
class Mean:
    """Geometric means over a group: times faster, the copies that each side took, ours as a multiple of the floor."""

    group: str
    cases: int
    times_faster: float
    copies: float
    copies_torch: float
    floors: float


def timed(content: dict[str, Any]) -> list[dict[str, Any]]:
    """The results that were right, and so timed."""
    return [result for result in content["results"] if not result["fault"]]


def _mean(group: str, results: Sequence[dict[str, Any]]) -> Mean:
    copies = [result["copies"] for result in results]
    return Mean(
        group,
        len(results),
        geometric_mean(result["times_faster"]["median"] for result in results),
        geometric_mean(c["ours"] for c in copies),
        geometric_mean(c["torch"] for c in copies),
        geometric_mean(c["ours"] / c["floor"] for c in copies),
    )


def geometric_means(content: dict[str, Any]) -> list[Mean]:
    """Over all large cases, then by mode, operation, dtype and layout."""
    large = [result for result in timed(content) if result["bytes"] >= LARGE]
    if not large:
        return []
    means = [_mean("all", large)]
    for key in GROUPS:
        for value in dict.fromkeys(result[key] for result in large):
            means.append(_mean(value, [result for result in large if result[key] == value]))
    return means


def worst(content: dict[str, Any], count: int = 5) -> list[dict[str, Any]]:
    """The timed cases, of any size, in which ours is the least ahead."""
    return sorted(timed(content), key=lambda result: float(result["times_faster"]["median"]))[:count]
