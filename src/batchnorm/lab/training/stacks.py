"""Stacks: runs of one arm, trained side by side as one batched network.

A stack is the unit of work. Its runs follow from the plan and never from the number of workers, so that numbers do not
depend on it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from batchnorm.lab.training.records import RecordName
from batchnorm.lab.training.runs import Target
from batchnorm.lab.training.settings import Arm, Settings

__all__ = ["Stack", "cut"]

RUNS_PER_STACK = 11


@dataclass(frozen=True)
class Stack:
    """Runs of one arm, trained together.

    Attributes
    ----------
    key, phase : str
        Unique name, and the phase of the comparison that the stack belongs to.
    arm : Arm
    learning_rates, seeds : tuple
        One value per run.
    settings : Settings
    test : bool
        Evaluate the test rows at the end.
    trace : bool
        Keep percentiles of the first run (see `Run`).
    records : tuple of RecordName
        Recorders to attach.
    stop : Target or None
        Stop once more than half of the seeds of a learning rate have reached this target.
    """

    key: str
    phase: str
    arm: Arm
    learning_rates: tuple[float, ...]
    seeds: tuple[int, ...]
    settings: Settings
    test: bool = False
    trace: bool = False
    records: tuple[RecordName, ...] = ()
    stop: Target | None = None


def cut(
    name: str,
    phase: str,
    arm: Arm,
    pairs: Sequence[tuple[float, int]],
    settings: Settings,
    *,
    test: bool = False,
    records: tuple[RecordName, ...] = (),
    stop: Target | None = None,
) -> list[Stack]:
    """Cut pairs of learning rate and seed into stacks of about equal size.

    With ``stop`` they stay one stack, which stops as a whole.
    """
    count = 1 if stop is not None else math.ceil(len(pairs) / RUNS_PER_STACK)
    return [
        Stack(
            key=f"{name}/{arm}/{number}",
            phase=phase,
            arm=arm,
            learning_rates=tuple(pairs[i][0] for i in piece),
            seeds=tuple(pairs[i][1] for i in piece),
            settings=settings,
            test=test,
            records=records,
            stop=stop,
        )
        for number, piece in enumerate(np.array_split(np.arange(len(pairs)), count))
    ]
