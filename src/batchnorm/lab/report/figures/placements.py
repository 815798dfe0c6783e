"""Before or after the nonlinearity: each seed's steps and test score in the one placement joined to the other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from batchnorm.lab.comparison.scores import Difference
from batchnorm.lab.comparison.verdict import difference_text, steps_text
from batchnorm.lab.json_records import from_json
from batchnorm.lab.report.figures.beyond import place, steps_axis, zone_rule
from batchnorm.lab.report.figures.downloads import Data
from batchnorm.lab.report.figures.evidence import Evidence
from batchnorm.lab.report.figures.figure import LABELS, Axis, Figure, Mark, Plot, Rule, Series, Table, Value, shown
from batchnorm.lab.training.runs import median_steps

__all__ = ["placements"]

COLUMNS = {"before": 0.0, "after": 1.0}
SPREAD = 0.24

Places = Mapping[str, Sequence[tuple[Value, Mark]]]


def _pairs(title: str, y: Axis, places: Places, said: Mapping[str, Sequence[str]], rules: Sequence[Rule] = ()) -> Plot:
    """A column of marks for each placement, the seeds side by side, and a line from each to its other."""
    seeds = len(places["before"])
    beside = [(i / max(seeds - 1, 1) - 0.5) * SPREAD for i in range(seeds)]
    lines = Series(
        "pair",
        [x for at in beside for x in (COLUMNS["before"] + at, COLUMNS["after"] + at, None)],
        [y for i in range(seeds) for y in (places["before"][i][0], places["after"][i][0], None)],
    )
    columns = [
        Series(
            arm,
            [column + at for at in beside],
            [y for y, _ in places[arm]],
            line=False,
            marks=[mark for _, mark in places[arm]],
            text=said[arm],
        )
        for arm, column in COLUMNS.items()
    ]
    ticks = [(x, LABELS[arm]) for arm, x in COLUMNS.items()]
    return Plot(title, Axis("", ticks=ticks, range=(-0.45, 1.45)), y, [lines, *columns], rules)


def _steps(counts: Mapping[str, Sequence[Value]], steps: int) -> Plot:
    said = {arm: [f"seed {i}: {steps_text(c, steps)} steps" for i, c in enumerate(counts[arm], 1)] for arm in COLUMNS}
    return _pairs(
        "Steps to the target",
        steps_axis("", [count for arm in COLUMNS for count in counts[arm]], steps),
        {arm: [place(arm, count, steps) for count in counts[arm]] for arm in COLUMNS},
        said,
        [zone_rule("y", steps)],
    )


def _scores(name: str, scores: Mapping[str, Sequence[Value]]) -> Plot:
    places: dict[str, list[tuple[Value, Mark]]] = {
        arm: [(score, "known") for score in values] for arm, values in scores.items()
    }
    said = {arm: [f"seed {i}: {shown(s)}" for i, s in enumerate(values, 1)] for arm, values in scores.items()}
    return _pairs(f"Test {name}", Axis(""), places, said)


def _sooner(counts: Mapping[str, Sequence[Value]]) -> str:
    """How many seeds arrive sooner in which placement."""
    before = after = 0
    for one, other in zip(counts["before"], counts["after"], strict=True):
        before += one is not None and (other is None or one < other)
        after += other is not None and (one is None or other < one)
    rest = len(counts["before"]) - before - after
    return f"{before} arrive sooner before the nonlinearity and {after} after it" + (
        f"; for {rest} it is the same or can't be told" if rest else ""
    )


def placements(evidence: Evidence, details: dict[str, Any]) -> Figure | None:
    """Steps to the target and test score of each seed, before and after; None where they were not counted."""
    counts = {arm: details.get("steps", {}).get(arm) or [] for arm in COLUMNS}
    seeds = len(counts["before"])
    if not seeds or evidence.result is None:
        return None
    steps = evidence.settings.steps
    scores = {arm: evidence.result["arms"][arm]["test_scores"] for arm in COLUMNS}
    medians = [f"{steps_text(median_steps(counts[arm]), steps)} {arm}" for arm in COLUMNS]
    found = details.get("test_difference")
    difference = from_json(Difference, found) if found else None
    tested = (
        f" The test {evidence.score_name} differs by {difference_text(difference)}, before less after."
        if difference
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
        table=Table(
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
