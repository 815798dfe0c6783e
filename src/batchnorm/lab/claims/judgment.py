"""Verdicts: an exact sign test over pairs, corrected for the number of claims that are judged together."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from batchnorm.lab.claims.measurement import MIN_PAIRS, Effect, Family, Kind, Measurement, Subject, sign_test
from batchnorm.lab.comparison.measures import Bounds, PairSummary, summarize_pairs
from batchnorm.lab.comparison.verdict import WHERE, factor_text, number

__all__ = [
    "ALPHA",
    "Finding",
    "Power",
    "holm",
    "judge",
    "power",
    "sentence",
]

ALPHA = 0.05
TRUE_SHARE = 0.9

Verdict = Literal["holds", "does not hold", "undecided"]


@dataclass(frozen=True)
class Finding:
    """A judged measurement.

    Attributes
    ----------
    subject, label, kind, family, margin, no_effect
        As of the measurement and its effect.
    unit : str
        Unit of the amount.
    pairs : list of (lower, upper)
        The amount of each pair, or its bounds.
    median, interval, confidence
        Summary of the pairs (see `PairSummary`); None where there are no pairs.
    p_holds, p_fails : float or None
        p-values of "no better than no effect" and of "at least the margin"; None where nothing was judged.
    adjusted_holds, adjusted_fails : float or None
        The same, corrected for the number of measurements judged together.
    verdict : "holds", "does not hold" or "undecided"
    reason : str or None
        Why it is undecided.
    text : str
        The median with its interval in words.
    """

    subject: Subject
    label: str
    unit: str
    kind: Kind
    family: Family
    pairs: list[Bounds]
    median: Bounds | None
    interval: Bounds | None
    confidence: float | None
    no_effect: float
    margin: float
    p_holds: float | None
    p_fails: float | None
    adjusted_holds: float | None
    adjusted_fails: float | None
    verdict: Verdict
    reason: str | None
    text: str


@dataclass(frozen=True)
class Power:
    """The power of a number of pairs in a number of tests.

    Attributes
    ----------
    seeds, tests : int
        Number of pairs, and of measurements judged together.
    alpha : float
        Level of the tests.
    pairs_needed : int or None
        Number of pairs that must agree for the first of Holm's steps; None where even all of them are too few.
    share : float
        Share of pairs that agree in truth, for which ``power`` is computed.
    power : float
        Probability that at least ``pairs_needed`` pairs agree.
    text : str
        The same in one sentence.
    """

    seeds: int
    tests: int
    alpha: float
    pairs_needed: int | None
    share: float
    power: float
    text: str


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p-values corrected for their number (Holm 1979).

    The probability that any true null hypothesis has a corrected p-value of at most alpha is at most alpha.

    >>> holm([0.01, 0.04, 0.03])
    [0.03, 0.06, 0.06]
    """
    adjusted = [1.0] * len(p_values)
    largest = 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted


def power(pairs: int, tests: int) -> Power:
    """Return how many pairs must agree in so many tests, and how often they do where 9 of 10 agree in truth."""
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
            f"With {tests} tests a claim is certain to be found where {agree} seeds agree; if in truth "
            f"{TRUE_SHARE:.0%} of pairs agree, that happens in {found:.0%} of studies."
        )
    return Power(pairs, tests, ALPHA, needed, TRUE_SHARE, found, text)


def _amount(effect: Effect, summary: PairSummary) -> str:
    """Return the median with its interval in words, such as "10 to 19x fewer steps [2.3, inf]"."""
    median, interval = summary.median, summary.interval
    if effect.kind == "ratio":
        unit = effect.more
        if median[1] < 1:
            unit = effect.less
            median, interval = (
                (1 / high if high > 0 else math.inf, 1 / low if low > 0 else math.inf)
                for low, high in (median, interval)
            )
        if factor_text(median) == "unknown":
            return "unknown"
        low, high = (("inf" if end == math.inf else number(end)) for end in interval)
        return f"{factor_text(median)} {unit} [{low}, {high}]"
    if not math.isfinite(median[0]):
        return "unknown"
    sign = 1 if median[0] >= 0 else -1
    amount, *ends = (number(sign * value + 0.0) for value in (median[0], *interval[::sign]))  # + 0.0: -0 reads as 0
    unit = effect.more if sign > 0 else effect.less
    return f"{amount} {unit.replace('decades', 'decade') if amount == '1' else unit} [{ends[0]}, {ends[1]}]"


def _reason(measurement: Measurement, adjusted: float) -> str:
    """Return why a measurement is neither shown to hold nor shown not to hold."""
    if measurement.reason is not None:
        return measurement.reason
    if not measurement.judged:
        return f"a verdict takes at least {MIN_PAIRS} seeds; got {len(measurement.pairs)}"
    agreeing = sum(low > measurement.effect.no_effect for low, _ in measurement.pairs)
    pairs = "parts of the rows" if measurement.subject == "inputs" else "seeds"
    return f"{agreeing} of {len(measurement.pairs)} {pairs} agree, corrected p = {number(adjusted)}"


def judge(measurements: Sequence[Measurement]) -> list[Finding]:
    """Return a finding per measurement, all of them judged together."""
    adjusted: dict[int, tuple[float, float]] = {}
    for family in ("steps", "seconds"):
        together = [i for i, m in enumerate(measurements) if m.judged and m.effect.family == family]
        holds = holm([measurements[i].p_holds for i in together])
        fails = holm([measurements[i].p_fails for i in together])
        adjusted |= dict(zip(together, zip(holds, fails, strict=True), strict=True))
    return [_finding(measurement, adjusted.get(i)) for i, measurement in enumerate(measurements)]


def _finding(measurement: Measurement, adjusted: tuple[float, float] | None) -> Finding:
    """Return the finding of a measurement from its corrected p-values, which are None where it can't be judged."""
    effect = measurement.effect
    summary = summarize_pairs(measurement.pairs) if measurement.pairs else None
    holds, fails = adjusted or (1.0, 1.0)
    verdict: Verdict = "holds" if holds <= ALPHA else "does not hold" if fails <= ALPHA else "undecided"
    return Finding(
        subject=measurement.subject,
        label=effect.label,
        unit=effect.unit,
        kind=effect.kind,
        family=effect.family,
        pairs=list(measurement.pairs),
        median=summary.median if summary else None,
        interval=summary.interval if summary else None,
        confidence=summary.confidence if summary else None,
        no_effect=effect.no_effect,
        margin=effect.margin,
        p_holds=measurement.p_holds if adjusted else None,
        p_fails=measurement.p_fails if adjusted else None,
        adjusted_holds=holds if adjusted else None,
        adjusted_fails=fails if adjusted else None,
        verdict=verdict,
        reason=_reason(measurement, holds) if verdict == "undecided" else None,
        text=_amount(effect, summary) if summary else "not measured",
    )


def sentence(statement: str, findings: Sequence[Finding]) -> str:
    """Return a claim and its verdicts in one plain sentence."""
    several = len({finding.label for finding in findings}) > 1
    parts = []
    for finding in findings:
        what = f" for {finding.label}" if several else ""
        where = f" {WHERE[finding.subject]}" if finding.subject in WHERE else ""
        because = f"; {finding.reason}" if finding.reason else ""
        parts.append(f"{finding.verdict}{what}{where} ({finding.text}{because})")
    return f"{statement}: {'; '.join(parts)}."
