"""Figure of the inputs of the last hidden nonlinearity over training: Ioffe & Szegedy (2015), Fig. 1 b and c."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from batchnorm.lab.report.figures.controls import X_SCALE, Control
from batchnorm.lab.report.figures.evidence import Evidence
from batchnorm.lab.report.figures.figure import (
    LABELS,
    PHRASES,
    Axis,
    Figure,
    FigureTable,
    Plot,
    Series,
    listed,
    shown,
)
from batchnorm.lab.training.settings import ARMS

__all__ = ["last_inputs"]

EVERY = 4


def _traces(evidence: Evidence) -> dict[str, NDArray[np.float64]]:
    """Return the percentiles (evaluations, units, 3) of the one traced run of each arm."""
    runs = {arm: next((run for run in evidence.confirm[arm] if run.trace), None) for arm in ARMS}
    return {arm: np.array(run.trace, dtype=float) for arm, run in runs.items() if run is not None}


def last_inputs(evidence: Evidence) -> Figure | None:
    """Return percentiles of the inputs of the last hidden nonlinearity; None where no run was traced."""
    traces = _traces(evidence)
    if not traces:
        return None
    units = next(iter(traces.values())).shape[1]
    evaluations = evidence.evaluations
    plots = [
        Plot(
            LABELS[arm].capitalize(),
            Axis("gradient steps", "log", "steps", "x"),
            Axis("", shared=True),
            [
                Series(
                    arm,
                    evaluations[: len(trace)],
                    [*trace[:, unit, 1]],
                    [*trace[:, unit, 0]],
                    [*trace[:, unit, 2]],
                    choice={"unit": str(unit + 1)},
                )
                for unit in range(units)
            ],
        )
        for arm, trace in traces.items()
    ]
    widths = []
    for arm, trace in traces.items():
        width = np.median(trace[:, :, 2] - trace[:, :, 0], axis=1)
        widths.append(f"from {shown(width[0])} to {shown(width[-1])} {PHRASES[arm]}")
    chosen = sorted({*range(0, len(evaluations), EVERY), len(evaluations) - 1})
    return Figure(
        key="inputs",
        title="Inputs of the last hidden nonlinearity",
        finding=(
            "From the first evaluation to the last, the distance between the 15th and the 85th percentile, median "
            f"over the units, goes {listed(widths)}."
        ),
        note=(
            "The line is the median over the validation rows and the band runs from the 15th to the 85th percentile, "
            f"for one unit of the run with seed {evidence.confirm['none'][0].seed if evidence.confirm['none'] else 0}"
            ", with the statistics that inference uses (as in Ioffe & Szegedy 2015, Fig. 1 b and c)."
        ),
        plots=plots,
        table=FigureTable(
            ["step", *(f"unit 1, {LABELS[arm]}: 15th, 50th, 85th percentile" for arm in traces)],
            [
                [
                    str(evaluations[i]),
                    *(", ".join(shown(v) for v in trace[i, 0]) for trace in traces.values() if i < len(trace)),
                ]
                for i in chosen
            ],
        ),
        controls=(Control("unit", "Unit", [(str(i + 1), str(i + 1)) for i in range(units)]), X_SCALE),
    )
