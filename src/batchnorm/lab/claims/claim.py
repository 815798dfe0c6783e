"""The form of a claim."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from batchnorm.lab.claims.judgement import Measurement
from batchnorm.lab.claims.study import Study
from batchnorm.lab.training.records import RecordName
from batchnorm.lab.training.stacks import Stack

__all__ = ["Claim", "Measured"]


@dataclass(frozen=True)
class Measured:
    """What was measured for a claim: what is judged, and what else its figure shows."""

    measurements: Sequence[Measurement]
    details: dict[str, Any] = field(default_factory=dict)


def _no_stacks(_: Study) -> list[Stack]:
    return []


@dataclass(frozen=True)
class Claim:
    """A claim made for batch normalization, and how it is measured.

    Attributes
    ----------
    name, title, question : str
        What ``--claim`` calls it, its heading, and what it asks.
    statement : str
        What is claimed, as the beginning of the sentence of its verdict.
    design : function of a Study
        How it is measured, in a paragraph.
    measure : function of a Study
        The measurements, from the finished runs.
    stacks : function of a Study
        What it trains beside the comparison.
    records : tuple of RecordName
        What the confirming runs of the comparison must record for it.
    """

    name: str
    title: str
    question: str
    statement: str
    design: Callable[[Study], str]
    measure: Callable[[Study], Measured]
    stacks: Callable[[Study], list[Stack]] = _no_stacks
    records: tuple[RecordName, ...] = ()
