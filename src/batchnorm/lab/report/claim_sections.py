"""What the report says of the claims that were judged: a verdict for each, and a section for each."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any
from urllib.parse import quote

from batchnorm.lab.comparison.verdict import number
from batchnorm.lab.report import figures
from batchnorm.lab.report.figures import LABELS, Data, Evidence, Figure
from batchnorm.lab.training.settings import ARMS

__all__ = ["ClaimSection", "Download", "Finding", "claim_sections"]

SUBJECTS = LABELS | {"inputs": "normalized inputs"}
COLUMNS = ("before", "after")
MARKS = {"holds": "holds", "does not hold": "fails", "undecided": "open"}


@dataclass(frozen=True)
class Finding:
    """What was judged of one subject, in words."""

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
    """A file that the page carries within itself."""

    name: str
    data: Data

    @property
    def href(self) -> str:
        """The file as a URL, for a browser that is offline."""
        return f"data:text/csv;charset=utf-8,{quote(self.data.csv(), safe=',')}"


@dataclass(frozen=True)
class ClaimSection:
    """A claim, its verdicts, how it was measured, and what shows it."""

    key: str
    title: str
    question: str
    sentence: str
    design: str
    confidence: str | None
    findings: list[Finding]
    figures: list[Figure]
    downloads: list[Download]

    @property
    def cells(self) -> list[tuple[str, int, list[Finding]]]:
        """The verdicts in the columns of the opening table: heading, columns taken up, findings."""
        if len({finding.subject for finding in self.findings}) == 1:
            return [(self.findings[0].subject_label, len(COLUMNS), self.findings)]
        return [(LABELS[arm], 1, [finding for finding in self.findings if finding.subject == arm]) for arm in COLUMNS]

    @property
    def labelled(self) -> bool:
        """Whether a verdict needs to be told from the others of its subject."""
        return len({finding.label for finding in self.findings}) > 1


def _p(alone: float | None, adjusted: float | None) -> str:
    """A p-value and what it is when corrected."""
    if alone is None or adjusted is None:
        return "not tested"
    return ", ".join("< 0.001" if value < 0.001 else f"{value:.2g}" for value in (alone, adjusted))


def _finding(values: dict[str, Any]) -> Finding:
    ratio = values["kind"] == "ratio"
    return Finding(
        subject=values["subject"],
        subject_label=SUBJECTS[values["subject"]],
        label=values["label"],
        verdict=values["verdict"],
        mark=MARKS[values["verdict"]],
        text=values["text"],
        reason=values["reason"] or "",
        no_effect=number(values["no_effect"]),
        p_holds=_p(values["p_holds"], values["adjusted_holds"]),
        margin=f"{number(values['margin'])} times" if ratio else number(values["margin"]),
        p_fails=_p(values["p_fails"], values["adjusted_fails"]),
    )


def _race(evidence: Evidence, _: dict[str, Any]) -> Figure:
    """The race, with the steps behind the verdict as its data."""
    rows = [[arm, seed, count] for arm in ARMS for seed, count in enumerate(evidence.arrivals[arm], 1)]
    columns = ["arm", "seed", f"steps to the target (empty: more than {evidence.settings.steps})"]
    return replace(figures.race(evidence), data=Data("steps of every run to the target", columns, rows))


FIGURES: dict[str, Sequence[Callable[[Evidence, dict[str, Any]], Figure | None]]] = {
    "fewer_steps": (_race,),
    "stability": (figures.stability,),
    "initial_weights": (figures.initial_weights,),
    "regularization": (figures.regularization,),
    "inputs": (figures.inputs,),
    "placement": (figures.placements,),
    "shift": (figures.drift, figures.layers, figures.subnetworks),
}


def _file_name(*parts: str) -> str:
    """A file's name of letters, digits, dots and dashes, whatever the data are called."""
    words = [re.sub(r"[^\w.]+|_", "-", part).strip("-.") for part in parts]
    return "-".join(word for word in words if word) + ".csv"


def _pairs(findings: list[dict[str, Any]]) -> Data:
    """What was judged, pair by pair."""
    return Data(
        "the pairs behind the verdict",
        ["of", "what", "unit", "pair", "at least", "at most"],
        [
            [finding["subject"], finding["label"], finding["unit"], i, *pair]
            for finding in findings
            for i, pair in enumerate(finding["pairs"], 1)
        ],
    )


def _downloads(name: str, claim: dict[str, Any], drawn: list[Figure]) -> list[Download]:
    """The data of a section's figures, and the pairs behind its verdicts."""
    with_data = [(figure, figure.data) for figure in drawn if figure.data]
    downloads = []
    for figure, data in with_data:
        own = () if len(with_data) == 1 else (figure.key,)
        downloads.append(Download(_file_name(name, claim["name"], *own), data))
    pairs = _pairs(claim["findings"])
    if pairs.rows:
        downloads.append(Download(_file_name(name, claim["name"], "pairs"), pairs))
    return downloads


def _gaps(value: Any) -> Any:
    """The value as it is when read back from run.json: None for what is not a number."""
    if isinstance(value, dict):
        return {key: _gaps(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_gaps(item) for item in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def _section(evidence: Evidence, claim: dict[str, Any]) -> ClaimSection:
    drawn = [figure for draw in FIGURES[claim["name"]] if (figure := draw(evidence, claim["details"] or {}))]
    known = [finding["confidence"] for finding in claim["findings"] if finding["confidence"]]
    return ClaimSection(
        key=f"claim-{claim['name']}",
        title=claim["title"],
        question=claim["question"],
        sentence=claim["sentence"],
        design=claim["design"],
        confidence=f"{min(known):.1%}" if known else None,
        findings=[_finding(finding) for finding in claim["findings"]],
        figures=drawn,
        downloads=_downloads(evidence.data["name"], claim, drawn),
    )


def claim_sections(evidence: Evidence) -> list[ClaimSection]:
    """A section for each claim that was judged, in their order; none where there was no study."""
    claims = evidence.result.get("claims") if evidence.result else None
    return [_section(evidence, _gaps(claim)) for claim in claims or []]
