"""The parts of a claim: its question, the stacks it trains, its measurements, and the details that its figure shows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from batchnorm.lab.claims.judgment import Finding
from batchnorm.lab.claims.measurement import Measurement
from batchnorm.lab.comparison.study import Study
from batchnorm.lab.training.records import RecordName
from batchnorm.lab.training.stacks import Stack

__all__ = ["Claim", "Details", "JudgedClaim", "Measured"]


@dataclass(frozen=True)
class Details:
    """Base of what a claim measured besides its pairs, for its figures; each claim has a class of its own."""


@dataclass(frozen=True)
class Measured:
    """The measurements of a claim, to be judged, and its details; None where it has none."""

    measurements: Sequence[Measurement]
    details: Details | None = None


def _no_stacks(_: Study) -> list[Stack]:
    return []


@dataclass(frozen=True)
class Claim:
    """A claim about batch normalization, and how it is measured.

    Attributes
    ----------
    name, title, question : str
        Its name in ``claims=``, its heading, and its question.
    statement : str
        The assertion, as the beginning of the sentence of its verdict.
    design : function of a Study
        Returns how it is measured, in a paragraph.
    measure : function of a Study
        Returns the measurements, from the finished runs.
    stacks : function of a Study
        Returns the stacks that it trains besides the comparison.
    records : tuple of RecordName
        The recorders that it needs in the confirming runs of the comparison.
    details : type
        Class of the details that ``measure`` returns.
    """

    name: str
    title: str
    question: str
    statement: str
    design: Callable[[Study], str]
    measure: Callable[[Study], Measured]
    stacks: Callable[[Study], list[Stack]] = _no_stacks
    records: tuple[RecordName, ...] = ()
    details: type[Details] = Details


@dataclass(frozen=True)
class JudgedClaim:
    """A claim with its findings.

    Attributes
    ----------
    name, title, question : str
        As of the claim.
    design : str
        How it was measured.
    sentence : str
        The verdicts in one sentence.
    findings : list of Finding
    details : Details or None
        An instance of the claim's own class of details; None where nothing was measured.
    """

    name: str
    title: str
    question: str
    design: str
    sentence: str
    findings: list[Finding]
    details: Details | None
