"""Measures that the sweeps of learning rates and of initial weights share: decades over which a seed trains."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from batchnorm.lab.comparison.measures import Bounds
from batchnorm.lab.comparison.study import Study
from batchnorm.lab.training.runs import Run
from batchnorm.lab.training.settings import Arm

__all__ = ["share", "width_pairs", "widths"]


def share(true_of: Callable[[Run], bool], runs: Sequence[Run]) -> float:
    """Return the share of some runs for which a condition is true."""
    return sum(map(true_of, runs)) / len(runs)


def widths(study: Study, swept: Sequence[Sequence[Run]], spacing: float) -> list[float]:
    """Return the decades over which each seed trains: ``spacing`` for each of the values swept at which it does."""
    return [spacing * sum(study.trains(run) for run in of_seed) for of_seed in zip(*swept, strict=True)]


def width_pairs(decades: dict[Arm, list[float]], arm: Arm) -> list[Bounds]:
    """Return by how many decades an arm trains over more than the arm without batch norm, seed by seed."""
    return [(more - fewer,) * 2 for more, fewer in zip(decades[arm], decades["none"], strict=True)]
