"""Summary of a result as text: the verdict, the table of the arms, the costs, the caveat, and the judged claims."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from batchnorm.lab.claims import Judgment
from batchnorm.lab.claims.claim import JudgedClaim
from batchnorm.lab.comparison.result import Result
from batchnorm.lab.comparison.verdict import difference_text, number, ratio_text, steps_text
from batchnorm.reports import Block, Table

__all__ = ["summarize"]


def summarize(result: Result, judgment: Judgment | None) -> Iterator[Block]:
    """Yield the parts of the summary of a complete comparison."""
    yield result.verdict or "The comparison is not finished."
    yield ""
    yield _arms(result)
    yield ""
    if result.headline and result.ratios:
        confidence = min(ratio.confidence for ratio in result.ratios.values())
        yield f"Ratios are without batch norm over with it; intervals have {100 * confidence:.3g}% confidence."
    yield from filter(None, (_differences(result), _seconds(result)))
    if result.stacking is not None and result.stacking.factor > 1:
        stacking = result.stacking
        yield f"{stacking.runs} networks were trained in stacks, {number(stacking.factor)}x as fast as one by one."
    if result.caveat:
        yield f"Caveat: {result.caveat}"
    if judgment is not None:
        yield ""
        yield _claims(judgment.claims)
        yield ""
        yield judgment.power.text
    if result.notes:
        yield ""
        yield "On the data:"
        yield from (f"- {note}" for note in result.notes)


def _arms(result: Result) -> Table:
    steps = result.evaluation_steps[-1]
    arms = result.arms
    ratios = [
        "-" if not result.headline else ratio_text(result.ratios[arm]) if arm in result.ratios else "1" for arm in arms
    ]
    return Table(
        ["batch norm", "rate", "steps", "ratio of steps", "reached at", f"test {result.score_name}"],
        [
            list(arms),
            [f"{values.learning_rate:g}" for values in arms.values()],
            [steps_text(values.median_steps, steps) for values in arms.values()],
            ratios,
            [f"{values.rates_that_reach} of {len(values.search)} rates" for values in arms.values()],
            ["diverged" if math.isnan(values.test_score) else f"{values.test_score:.3f}" for values in arms.values()],
        ],
    )


def _differences(result: Result) -> str:
    """Return the test scores with batch norm less that without, with their intervals."""
    parts = [
        f"{arm} {difference_text(ratio.test_difference)}"
        for arm, ratio in result.ratios.items()
        if ratio.test_difference is not None
    ]
    return f"Test {result.score_name} against none: {', '.join(parts)}." if parts else ""


def _seconds(result: Result) -> str:
    """Return the time per step of each arm, and the ratios of seconds that follow from it."""
    steps = [
        f"{arm} {1000 * values.seconds_per_step:.2f}"
        for arm, values in result.arms.items()
        if values.seconds_per_step is not None
    ]
    ratios = [f"{arm} {ratio_text(ratio.seconds)}" for arm, ratio in result.ratios.items() if ratio.seconds]
    if not steps:
        return ""
    return f"Milliseconds per step: {', '.join(steps)}." + (
        f" Ratio of seconds: {', '.join(ratios)}." if result.headline else ""
    )


def _claims(claims: Sequence[JudgedClaim]) -> Table:
    """Return a row per effect, with its verdict before and after the nonlinearity."""
    rows = []
    for claim in claims:
        verdicts: dict[str, dict[str, str]] = {}
        for finding in claim.findings:
            verdicts.setdefault(finding.label, {})[finding.subject] = finding.verdict
        for label, by_subject in verdicts.items():
            before = by_subject.get("before") or by_subject.get("inputs", "")
            rows.append((f"{claim.name}: {label}", before, by_subject.get("after", "")))
    return Table(["claim", "before", "after"], list(zip(*rows, strict=True)))
