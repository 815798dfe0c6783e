"""When a claim holds: an exact sign test over pairs, corrected for the number of claims judged together."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from batchnorm.lab.comparison.measures import Bounds, median_ratio
from batchnorm.lab.comparison.verdict import WHERE, bounds_text, number

__all__ = ["ALPHA", "FEWEST_PAIRS", "Measurement", "holm", "judge", "power", "sign_test"]

ALPHA = 0.05
FEWEST_PAIRS = 5
TRUE_SHARE = 0.9

Kind = Literal["ratio", "difference"]
Family = Literal["steps", "seconds"]


@dataclass(frozen=True)
class Measurement:
    """What a claim says of one subject, measured once for each pair of runs.

    Attributes
    ----------
    subject : str
        "before" or "after", the placement it is about, or "inputs".
    label : str
        What is claimed, as "fewer steps".
    more, less : str
        Unit of the amount where it is as claimed and where it is not: "times fewer steps", "times more steps".
    kind : "ratio" or "difference"
        Against 1 or against 0; larger is as claimed.
    pairs : list of (lower, upper)
        The amount for each pair of runs, or what bounds it.
    margin : float
        The least amount worth having; a claim does not hold where the median is shown to be below it.
    reason : str, optional
        Why it can't be judged.
    family : "steps" or "seconds"
        Measurements are corrected within a family, so that no measured time moves the verdict of another.
    """

    subject: str
    label: str
    more: str
    less: str
    kind: Kind
    pairs: Sequence[Bounds]
    margin: float
    reason: str | None = None
    family: Family = "steps"

    @property
    def no_effect(self) -> float:
        """The amount that stands for no difference."""
        return 1.0 if self.kind == "ratio" else 0.0

    @property
    def judged(self) -> bool:
        """Whether there is enough to judge."""
        return self.reason is None and len(self.pairs) >= FEWEST_PAIRS

    @property
    def p_holds(self) -> float:
        """p-value against "the median is no better than no effect"; a pair that does not tell counts against."""
        return sign_test(sum(low > self.no_effect for low, _ in self.pairs), len(self.pairs))

    @property
    def p_fails(self) -> float:
        """p-value against "the median is at least the margin"."""
        return sign_test(sum(high < self.margin for _, high in self.pairs), len(self.pairs))


def sign_test(agreeing: int, pairs: int) -> float:
    """Chance of so many agreeing pairs or more where each agrees with probability 1/2.

    >>> sign_test(10, 10)
    0.0009765625
    """
    return sum(math.comb(pairs, i) for i in range(agreeing, pairs + 1)) / 2.0**pairs


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values corrected for their number (Holm 1979): what is at most alpha is wrong somewhere with that chance.

    >>> holm([0.01, 0.04, 0.03])
    [0.03, 0.06, 0.06]
    """
    adjusted = [1.0] * len(p_values)
    largest = 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted


def power(pairs: int, tests: int) -> dict[str, Any]:
    """What so many pairs can show in so many tests: how many must agree, and how often they do.

    ``pairs_needed`` is what the first of Holm's steps asks for, None where all of them are too few; ``power`` is the
    chance to get there where in truth 9 of 10 pairs agree.
    """
    enough = [k for k in range(pairs + 1) if tests * sign_test(k, pairs) <= ALPHA]
    needed = min(enough, default=None)
    found = (
        0.0
        if needed is None
        else sum(
            math.comb(pairs, k) * TRUE_SHARE**k * (1 - TRUE_SHARE) ** (pairs - k) for k in range(needed, pairs + 1)
        )
    )
    if needed is None:
        text = f"With {pairs} seeds and {tests} tests no claim can be shown to hold: take more seeds."
    else:
        agree = f"all {pairs}" if needed == pairs else f"{needed} of {pairs}"
        text = (
            f"With {tests} tests a claim is sure to be found where {agree} seeds agree; where in truth "
            f"{TRUE_SHARE:.0%} of them would, that is {found:.0%} of studies."
        )
    return {
        "seeds": pairs,
        "tests": tests,
        "alpha": ALPHA,
        "pairs_needed": needed,
        "share": TRUE_SHARE,
        "power": found,
        "text": text,
    }


def _amount(measurement: Measurement, summary: dict[str, Any]) -> str:
    """The median with its interval in words: "10 to 19 times fewer steps [2.3, inf]"."""
    median, interval = summary["median"], summary["interval"]
    if measurement.kind == "ratio":
        unit = measurement.more
        if median[1] < 1:
            unit = measurement.less
            median, interval = (
                [1 / high if high > 0 else math.inf for high in (ends[1], ends[0])] for ends in (median, interval)
            )
        low, high = (("inf" if end == math.inf else number(end)) for end in interval)
        return f"{bounds_text(median)} {unit} [{low}, {high}]"
    if not math.isfinite(median[0]):
        return "unknown"
    sign = 1 if median[0] >= 0 else -1
    amount, *ends = (number(sign * value + 0.0) for value in (median[0], *interval[::sign]))  # + 0.0: -0 reads as 0
    unit = measurement.more if sign > 0 else measurement.less
    return f"{amount} {unit.replace('decades', 'decade') if amount == '1' else unit} [{ends[0]}, {ends[1]}]"


def _reason(measurement: Measurement, adjusted: float) -> str | None:
    """Why a measurement that is neither shown to hold nor shown not to is undecided."""
    if measurement.reason is not None:
        return measurement.reason
    if not measurement.judged:
        return f"a verdict takes at least {FEWEST_PAIRS} seeds; got {len(measurement.pairs)}"
    agreeing = sum(low > measurement.no_effect for low, _ in measurement.pairs)
    pairs = "parts of the rows" if measurement.subject == "inputs" else "seeds"
    return f"{agreeing} of {len(measurement.pairs)} {pairs} agree, corrected p = {number(adjusted)}"


def judge(measurements: Sequence[Measurement]) -> list[dict[str, Any]]:
    """A finding for each measurement, with its verdict; docs/compare.md names the keys."""
    adjusted: dict[int, tuple[float, float]] = {}
    for family in ("steps", "seconds"):
        together = [i for i, m in enumerate(measurements) if m.judged and m.family == family]
        holds = holm([measurements[i].p_holds for i in together])
        fails = holm([measurements[i].p_fails for i in together])
        adjusted |= dict(zip(together, zip(holds, fails, strict=True), strict=True))
    findings = []
    for i, measurement in enumerate(measurements):
        summary = median_ratio(measurement.pairs) if measurement.pairs else None
        holds_p, fails_p = adjusted.get(i, (1.0, 1.0))
        verdict = "holds" if holds_p <= ALPHA else "does not hold" if fails_p <= ALPHA else "undecided"
        findings.append(
            {
                "subject": measurement.subject,
                "label": measurement.label,
                "unit": measurement.more,
                "kind": measurement.kind,
                "family": measurement.family,
                "pairs": [list(pair) for pair in measurement.pairs],
                "median": summary and summary["median"],
                "interval": summary and summary["interval"],
                "confidence": summary and summary["confidence"],
                "no_effect": measurement.no_effect,
                "margin": measurement.margin,
                "p_holds": measurement.p_holds if measurement.judged else None,
                "p_fails": measurement.p_fails if measurement.judged else None,
                "adjusted_holds": holds_p if measurement.judged else None,
                "adjusted_fails": fails_p if measurement.judged else None,
                "verdict": verdict,
                "reason": _reason(measurement, holds_p) if verdict == "undecided" else None,
                "text": _amount(measurement, summary) if summary else "not measured",
            }
        )
    return findings


def sentence(statement: str, findings: Sequence[dict[str, Any]]) -> str:
    """A claim and its verdicts in one plain sentence."""
    several = len({finding["label"] for finding in findings}) > 1
    parts = []
    for finding in findings:
        what = f" for {finding['label']}" if several else ""
        where = f" {WHERE[finding['subject']]}" if finding["subject"] in WHERE else ""
        because = f"; {finding['reason']}" if finding["reason"] else ""
        parts.append(f"{finding['verdict']}{what}{where} ({finding['text']}{because})")
    return f"{statement}: {'; '.join(parts)}."
