"""Figure of the two placements: the steps and test score of each seed before and after the nonlinearity, joined."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from batchnorm.lab.claims.placement import PlacementDetails
from batchnorm.lab.comparison.verdict import difference_text, steps_text
from batchnorm.lab.report.figures.beyond import position, steps_axis, zone_line
from batchnorm.lab.report.figures.downloads import Data
from batchnorm.lab.report.figures.evidence import Evidence
from batchnorm.lab.report.figures.figure import (
    LABELS,
    Axis,
    Figure,
    FigureTable,
    Mark,
    Plot,
    ReferenceLine,
    Series,
    Value,
    shown,
)
from batchnorm.lab.training.runs import median_steps
from batchnorm.lab.training.settings import Arm

__all__ = ["placements"]

COLUMNS: dict[Arm, float] = {"before": 0.0, "after": 1.0}
WIDTH = 0.24

Positions = Mapping[Arm, Sequence[tuple[Value, Mark]]]


def _pairs(
    title: str,
    y: Axis,
    positions: Positions,
    texts: Mapping[Arm, Sequence[str]],
    lines: Sequence[ReferenceLine] = (),
) -> Plot:
    """Return a column of marks per placement, the seeds side by side, and a line between the two of each seed."""
    seeds = len(positions["before"])
    beside = [(i / max(seeds - 1, 1) - 0.5) * WIDTH for i in range(seeds)]
    joined = Series(
        "pair",
        [x for at in beside for x in (COLUMNS["before"] + at, COLUMNS["after"] + at, None)],
        [y for i in range(seeds) for y in (positions["before"][i][0], positions["after"][i][0], None)],
    )
    columns = [
        Series(
            arm,
            [column + at for at in beside],
            [y for y, _ in positions[arm]],
            line=False,
            marks=[mark for _, mark in positions[arm]],
            text=texts[arm],
        )
        for arm, column in COLUMNS.items()
    ]
    ticks = [(x, LABELS[arm]) for arm, x in COLUMNS.items()]
    return Plot(title, Axis("", ticks=ticks, range=(-0.45, 1.45)), y, [joined, *columns], lines)


def _steps(counts: Mapping[Arm, Sequence[Value]], steps: int) -> Plot:
    texts = {arm: [f"seed {i}: {steps_text(c, steps)} steps" for i, c in enumerate(counts[arm], 1)] for arm in COLUMNS}
    return _pairs(
        "Steps to the target",
        steps_axis("", [count for arm in COLUMNS for count in counts[arm]], steps),
        {arm: [position(arm, count, steps) for count in counts[arm]] for arm in COLUMNS},
        texts,
        [zone_line("y", steps)],
    )


def _scores(name: str, scores: Mapping[Arm, Sequence[Value]]) -> Plot:
    positions: dict[Arm, list[tuple[Value, Mark]]] = {
        arm: [(score, "known") for score in values] for arm, values in scores.items()
    }
    texts = {arm: [f"seed {i}: {shown(s)}" for i, s in enumerate(values, 1)] for arm, values in scores.items()}
    return _pairs(f"Test {name}", Axis(""), positions, texts)


def _sooner(counts: Mapping[Arm, Sequence[Value]]) -> str:
    """Return in words how many seeds reach the target sooner in which placement."""
    before = after = 0
    for one, other in zip(counts["before"], counts["after"], strict=True):
        before += one is not None and (other is None or one < other)
        after += other is not None and (one is None or other < one)
    rest = len(counts["before"]) - before - after
    return f"{before} reach the target sooner before the nonlinearity and {after} after it" + (
        f"; for {rest} the steps are equal or unknown" if rest else ""
    )


def placements(evidence: Evidence, details: PlacementDetails) -> Figure | None:
    """Return the steps to the target and the test score of each seed; None where they were not counted."""
    counts = {arm: details.steps.get(arm, []) for arm in COLUMNS}
    seeds = len(counts["before"])
    if not seeds or evidence.result is None:
        return None
    steps = evidence.settings.steps
    scores = {arm: evidence.result.arms[arm].test_scores for arm in COLUMNS}
    medians = [f"{steps_text(median_steps(counts[arm]), steps)} {arm}" for arm in COLUMNS]
    tested = (
        f" The test {evidence.score_name} differs by {difference_text(details.test_difference)}, before less after."
        if details.test_difference
        else ""
    )
    return Figure(
        key="placements",
        title="The two placements, seed by seed",
        finding=f"Of {seeds} seeds {_sooner(counts)}; the median steps are {' and '.join(medians)}.{tested}",
        note=(
            "A line joins the two runs of a seed, which begin with the same weights and see the same mini-batches. "
            f"Shaded: not within {steps} steps."
        ),
        plots=[_steps(counts, steps), _scores(evidence.score_name, scores)],
        table=FigureTable(
            [
                "seed",
                *(f"steps, {LABELS[arm]}" for arm in COLUMNS),
                *(f"test {evidence.score_name}, {LABELS[arm]}" for arm in COLUMNS),
            ],
            [
                [
                    str(i + 1),
                    *(steps_text(counts[arm][i], steps) for arm in COLUMNS),
                    *(shown(scores[arm][i]) for arm in COLUMNS),
                ]
                for i in range(seeds)
            ],
        ),
        data=Data(
            "steps and test score of every run",
            ["arm", "seed", f"steps (empty: more than {steps})", f"test {evidence.score_name}"],
            [
                [arm, i, count, score]
                for arm in COLUMNS
                for i, (count, score) in enumerate(zip(counts[arm], scores[arm], strict=True), 1)
            ],
        ),
    )
