"""Figure of other initial weights and other inputs: the steps to the target in each set-up."""

from __future__ import annotations

from batchnorm.lab.comparison.verdict import steps_text
from batchnorm.lab.report.figures.beyond import position, steps_axis, zone_line
from batchnorm.lab.report.figures.evidence import Evidence
from batchnorm.lab.report.figures.figure import LABELS, PHRASES, Axis, Figure, FigureTable, Plot, Series, listed
from batchnorm.lab.training.settings import ARMS

__all__ = ["variants"]

LANES = {"none": 0.22, "before": 0.0, "after": -0.22}


def variants(evidence: Evidence) -> Figure | None:
    """Return the median steps of the search seeds by set-up and arm; None where no variant was trained."""
    rows = evidence.result.sensitivity if evidence.result else []
    if not rows:
        return None
    steps = evidence.settings.variant_steps
    names = [row.name for row in rows]
    series = []
    for arm in ARMS:
        counts = [row.steps[arm] for row in rows]
        positions = [position(arm, count, steps) for count in counts]
        series.append(
            Series(
                arm,
                [x for x, _ in positions],
                [len(rows) - 1 - i + LANES[arm] for i in range(len(rows))],
                line=False,
                marks=[mark for _, mark in positions],
                text=[
                    f"{name}, {LABELS[arm]}: {steps_text(count, steps)} steps"
                    for name, count in zip(names, counts, strict=True)
                ],
            )
        )
    all_counts = [row.steps[arm] for row in rows for arm in ARMS]
    ticks = [(len(rows) - 1 - i, name) for i, name in enumerate(names)]
    reached = [f"{sum(row.steps[arm] is not None for row in rows)} {PHRASES[arm]}" for arm in ARMS]
    return Figure(
        key="variants",
        title="Initial weights and input scaling",
        finding=f"Of {len(rows)} set-ups, most search seeds reach the target in {listed(reached)}.",
        note=(
            "Median steps of the search seeds to the target, at the best of up to three learning rates: the "
            f"arm's own, and one about 3 times lower and higher. Shaded: not within {steps} steps at any of them."
        ),
        plots=[
            Plot(
                "Median steps to the target",
                steps_axis("gradient steps", all_counts, steps),
                Axis("", ticks=ticks, range=(-0.5, len(rows) - 0.5)),
                series,
                [zone_line("x", steps)],
            )
        ],
        table=FigureTable(
            ["set-up", *(LABELS[arm] for arm in ARMS)],
            [[row.name, *(steps_text(row.steps[arm], steps) for arm in ARMS)] for row in rows],
        ),
    )
