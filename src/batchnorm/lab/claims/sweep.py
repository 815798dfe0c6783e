"""What the sweeps of learning rates and of initial weights have in common: over how many decades a seed trains."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from batchnorm.lab.claims.study import Study
from batchnorm.lab.comparison.measures import Bounds
from batchnorm.lab.training.runs import Run
from batchnorm.lab.training.settings import Arm

__all__ = ["share", "width_pairs", "widths"]


def share(true_of: Callable[[Run], bool], runs: Sequence[Run]) -> float:
    """Share of some runs of which something is true."""
    return sum(map(true_of, runs)) / len(runs)


def widths(study: Study, swept: Sequence[Sequence[Run]], spacing: float) -> list[float]:
    """Decades over which each seed trains: how many of the values swept, each of which stands for its spacing."""
    return [spacing * sum(study.trains(run) for run in of_seed) for of_seed in zip(*swept, strict=True)]


def width_pairs(decades: dict[Arm, list[float]], arm: Arm) -> list[Bounds]:
    """How many decades more an arm bears than the arm without, seed by seed."""
    return [(more - fewer,) * 2 for more, fewer in zip(decades[arm], decades["none"], strict=True)]
