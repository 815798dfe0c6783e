"""The judged claims in the report: a verdict and a section each."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any
from urllib.parse import quote

from batchnorm.lab.claims.claim import JudgedClaim
from batchnorm.lab.claims.judgment import Finding, Verdict
from batchnorm.lab.comparison.verdict import number
from batchnorm.lab.report import figures
from batchnorm.lab.report.figures import LABELS, Data, Evidence, Figure
from batchnorm.lab.training.settings import ARMS

__all__ = ["ClaimSection", "Download", "FindingText", "claim_sections"]

SUBJECTS = LABELS | {"inputs": "normalized inputs"}
COLUMNS = ("before", "after")
MARKS: dict[Verdict, str] = {"holds": "holds", "does not hold": "fails", "undecided": "open"}


@dataclass(frozen=True)
class FindingText:
    """A finding in words."""

    subject: str
    subject_label: str
    label: str
    verdict: str
    mark: str
    text: str
    reason: str
    no_effect: str
    p_holds: str
    margin: str
    p_fails: str


@dataclass(frozen=True)
class Download:
    """A file that the page contains."""

    name: str
    data: Data

    @property
    def href(self) -> str:
        """The file as a URL that works offline."""
        return f"data:text/csv;charset=utf-8,{quote(self.data.csv(), safe=',')}"


@dataclass(frozen=True)
class ClaimSection:
    """The section of a claim: its verdicts, its design, its figures and their data."""

    key: str
    title: str
    question: str
    sentence: str
    design: str
    confidence: str | None
    findings: list[FindingText]
    figures: list[Figure]
    downloads: list[Download]

    @property
    def cells(self) -> list[tuple[str, int, list[FindingText]]]:
        """The verdicts in the columns of the opening table: heading, number of columns, findings."""
        if len({finding.subject for finding in self.findings}) == 1:
            return [(self.findings[0].subject_label, len(COLUMNS), self.findings)]
        return [(LABELS[arm], 1, [finding for finding in self.findings if finding.subject == arm]) for arm in COLUMNS]

    @property
    def labeled(self) -> bool:
        """Whether a verdict needs a label to tell it from the others of its subject."""
        return len({finding.label for finding in self.findings}) > 1


def _p(alone: float | None, adjusted: float | None) -> str:
    """Return a p-value and its corrected value."""
    if alone is None or adjusted is None:
        return "not tested"
    return ", ".join("< 0.001" if value < 0.001 else f"{value:.2g}" for value in (alone, adjusted))


def _in_words(finding: Finding) -> FindingText:
    return FindingText(
        subject=finding.subject,
        subject_label=SUBJECTS[finding.subject],
        label=finding.label,
        verdict=finding.verdict,
        mark=MARKS[finding.verdict],
        text=finding.text,
        reason=finding.reason or "",
        no_effect=number(finding.no_effect),
        p_holds=_p(finding.p_holds, finding.adjusted_holds),
        margin=f"{number(finding.margin)}x" if finding.kind == "ratio" else number(finding.margin),
        p_fails=_p(finding.p_fails, finding.adjusted_fails),
    )


def _race(evidence: Evidence) -> Figure:
    """Return the race, with the steps behind the verdict as its data."""
    rows = [[arm, seed, count] for arm in ARMS for seed, count in enumerate(evidence.arrivals[arm], 1)]
    columns = ["arm", "seed", f"steps to the target (empty: more than {evidence.settings.steps})"]
    return replace(figures.race(evidence), data=Data("steps of every run to the target", columns, rows))


FIGURES: dict[str, Sequence[Callable[[Evidence, Any], Figure | None]]] = {
    "stability": (figures.stability,),
    "initial_weights": (figures.initial_weights,),
    "regularization": (figures.regularization,),
    "inputs": (figures.inputs,),
    "placement": (figures.placements,),
    "shift": (figures.drift, figures.layers, figures.subnetworks),
}
"""The figures of a claim, each a function of the evidence and of the claim's own details."""


def _figures(evidence: Evidence, claim: JudgedClaim) -> list[Figure]:
    """Return the figures of a claim; a claim without details has none, except the race."""
    if claim.name == "fewer_steps":
        return [_race(evidence)]
    if claim.details is None:
        return []
    return [figure for draw in FIGURES[claim.name] if (figure := draw(evidence, claim.details))]


def _file_name(*parts: str) -> str:
    """Return a file name of letters, digits, dots and dashes, whatever the data are called."""
    words = [re.sub(r"[^\w.]+|_", "-", part).strip("-.") for part in parts]
    return "-".join(word for word in words if word) + ".csv"


def _pairs(findings: list[Finding]) -> Data:
    """Return the judged amounts, pair by pair."""
    return Data(
        "the pairs behind the verdict",
        ["subject", "effect", "unit", "pair", "at least", "at most"],
        [
            [finding.subject, finding.label, finding.unit, i, *pair]
            for finding in findings
            for i, pair in enumerate(finding.pairs, 1)
        ],
    )


def _downloads(name: str, claim: JudgedClaim, drawn: list[Figure]) -> list[Download]:
    """Return the data of a section's figures, and the pairs behind its verdicts."""
    with_data = [(figure, figure.data) for figure in drawn if figure.data]
    downloads = []
    for figure, data in with_data:
        suffix = () if len(with_data) == 1 else (figure.key,)
        downloads.append(Download(_file_name(name, claim.name, *suffix), data))
    pairs = _pairs(claim.findings)
    if pairs.rows:
        downloads.append(Download(_file_name(name, claim.name, "pairs"), pairs))
    return downloads


def _section(evidence: Evidence, claim: JudgedClaim) -> ClaimSection:
    drawn = _figures(evidence, claim)
    known = [finding.confidence for finding in claim.findings if finding.confidence]
    return ClaimSection(
        key=f"claim-{claim.name}",
        title=claim.title,
        question=claim.question,
        sentence=claim.sentence,
        design=claim.design,
        confidence=f"{min(known):.1%}" if known else None,
        findings=[_in_words(finding) for finding in claim.findings],
        figures=drawn,
        downloads=_downloads(evidence.data.name, claim, drawn),
    )


def claim_sections(evidence: Evidence, claims: Sequence[JudgedClaim]) -> list[ClaimSection]:
    """Return a section per judged claim, in their order."""
    return [_section(evidence, claim) for claim in claims]
