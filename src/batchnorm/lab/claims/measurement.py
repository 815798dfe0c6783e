"""Measurements: the effect that a claim asserts, measured pair by pair, and the sign test of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from batchnorm.lab.comparison.measures import Bounds

__all__ = ["MIN_PAIRS", "NORMALIZED_ARMS", "Effect", "Family", "Kind", "Measurement", "Subject", "sign_test"]

MIN_PAIRS = 5

Placed = Literal["before", "after"]
Subject = Literal["before", "after", "inputs"]
Kind = Literal["ratio", "difference"]
Family = Literal["steps", "seconds"]

NORMALIZED_ARMS: tuple[Placed, ...] = get_args(Placed)


@dataclass(frozen=True)
class Effect:
    """An effect that a claim asserts: its name, the units of its amount, and the least amount worth having.

    Attributes
    ----------
    label : str
        What is claimed, such as "fewer steps".
    more, less : str
        What there is more or less of, where the amount is as claimed and where it is the opposite: "fewer steps" and
        "more steps". The amount of a ratio is written as a factor before it, such as "4x fewer steps".
    kind : "ratio" or "difference"
        Whether the amount is compared with 1 or with 0; larger is as claimed.
    margin : float
        The least amount worth having: the claim does not hold where the median is shown to be below it.
    family : "steps" or "seconds"
        Effects are corrected within a family, so that no measured time moves the verdict of another effect.
    """

    label: str
    more: str
    less: str
    kind: Kind
    margin: float
    family: Family = "steps"

    @property
    def unit(self) -> str:
        """Unit of the amount where it is as claimed."""
        return f"x {self.more}" if self.kind == "ratio" else self.more

    @property
    def no_effect(self) -> float:
        """The amount that means no difference."""
        return 1.0 if self.kind == "ratio" else 0.0


@dataclass(frozen=True)
class Measurement:
    """An effect measured on one subject, once per pair of runs.

    Attributes
    ----------
    subject : "before", "after" or "inputs"
        The placement that the measurement is about, or "inputs".
    effect : Effect
    pairs : list of (lower, upper)
        The amount of each pair of runs, or its bounds.
    reason : str, optional
        Why the measurement can't be judged.
    """

    subject: Subject
    effect: Effect
    pairs: Sequence[Bounds]
    reason: str | None = None

    @property
    def judged(self) -> bool:
        """Whether there are enough pairs to judge, and no reason against it."""
        return self.reason is None and len(self.pairs) >= MIN_PAIRS

    @property
    def p_holds(self) -> float:
        """p-value of "the median is no better than no effect"; an undecided pair counts as one that disagrees."""
        return sign_test(sum(low > self.effect.no_effect for low, _ in self.pairs), len(self.pairs))

    @property
    def p_fails(self) -> float:
        """p-value of "the median is at least the margin"."""
        return sign_test(sum(high < self.effect.margin for _, high in self.pairs), len(self.pairs))


def sign_test(agreeing: int, pairs: int) -> float:
    """Return the probability of at least so many agreeing pairs where each agrees with probability 1/2.

    >>> sign_test(10, 10)
    0.0009765625
    """
    return sum(math.comb(pairs, i) for i in range(agreeing, pairs + 1)) / 2.0**pairs
