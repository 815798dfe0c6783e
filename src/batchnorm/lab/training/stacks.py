"""Units of work: runs of one arm that train side by side, set by the plan and never by the number of workers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from batchnorm.lab.training.runs import Target
from batchnorm.lab.training.settings import Arm, Settings

__all__ = ["Stack", "cut"]

RUNS_A_STACK = 11


@dataclass(frozen=True)
class Stack:
    """Runs of one arm, trained together.

    ``test`` reads the test rows at the end, ``trace`` keeps percentiles of the first run, ``records`` names what
    else is recorded (see `recorders`), and ``stop`` ends the stack once most seeds of a learning rate are there.
    """

    key: str
    phase: str
    arm: Arm
    learning_rates: tuple[float, ...]
    seeds: tuple[int, ...]
    settings: Settings
    test: bool = False
    trace: bool = False
    records: tuple[str, ...] = ()
    stop: Target | None = None


def cut(
    name: str,
    phase: str,
    arm: Arm,
    pairs: Sequence[tuple[float, int]],
    settings: Settings,
    *,
    whole: bool = False,
    **options: Any,
) -> list[Stack]:
    """Stacks of about equal size of pairs of learning rate and seed; one stack where it is to stop as a whole."""
    pieces = np.array_split(np.arange(len(pairs)), 1 if whole else math.ceil(len(pairs) / RUNS_A_STACK))
    return [
        Stack(
            key=f"{name}/{arm}/{number}",
            phase=phase,
            arm=arm,
            learning_rates=tuple(pairs[i][0] for i in piece),
            seeds=tuple(pairs[i][1] for i in piece),
            settings=settings,
            **options,
        )
        for number, piece in enumerate(pieces)
    ]
