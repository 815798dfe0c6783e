"""Figure of internal covariate shift: the outputs of sub-network P1, inputs of P2, change while P1 learns."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from batchnorm.lab.claims.shift import ShiftDetails
from batchnorm.lab.report.figures.bands import in_order_of_arms
from batchnorm.lab.report.figures.controls import Slider
from batchnorm.lab.report.figures.downloads import Data
from batchnorm.lab.report.figures.evidence import Evidence
from batchnorm.lab.report.figures.figure import LABELS, PHRASES, Axis, Figure, FigureTable, Plot, Series, listed, shown

__all__ = ["subnetworks"]


def _series(arm: str, by_probe: list[list[list[float]]]) -> list[Series]:
    """Return the rows as points at every probe, in front of their positions at the first."""

    def points(rows: list[list[float]], **options: Any) -> Series:
        x, y = ([row[i] for row in rows] for i in (0, 1))
        return Series(arm, x, y, line=False, marks=["known"] * len(rows), **options)

    by_step = [points(rows, choice={"step": str(i)}) for i, rows in enumerate(by_probe)]
    return [points(by_probe[0], faint=True), *by_step]


def _center(rows: list[list[float]]) -> tuple[float, float]:
    """Return the mean of the points; it is not finite where the run has diverged."""
    values = np.array(rows, dtype=float)
    return float(values[:, 0].mean()), float(values[:, 1].mean())


def _displacement(by_probe: list[list[list[float]]]) -> str:
    """Return in words how far the mean of the points moves from the first probe to the last."""
    distance = math.dist(_center(by_probe[0]), _center(by_probe[-1]))
    return f"by {distance:.2g}" if math.isfinite(distance) else "out of bounds"


def subnetworks(evidence: Evidence, details: ShiftDetails) -> Figure | None:
    """Return two outputs of P1 over training, each arm in a plot; None where P1 has fewer than two outputs."""
    arms = in_order_of_arms(details.outputs.rows)
    if not arms or any(len(row) < 2 for row in next(iter(arms.values()))[0]):
        return None
    probes, last = details.probes, details.outputs.layer
    first, hidden = int(last.rsplit(" ", 1)[1]), len(evidence.settings.hidden)
    one = "hidden layer 1" if first == 1 else f"hidden layers 1 to {first}"
    rest = [f"hidden layer {n}" if first + 1 == hidden else f"hidden layers {first + 1} to {hidden}" for n in [hidden]]
    two = listed([*(rest if first < hidden else []), "output layer"])
    displacements = [f"{_displacement(by_probe)} {PHRASES[arm]}" for arm, by_probe in arms.items()]
    return Figure(
        key="subnetworks",
        title="The inputs of P2 while P1 learns",
        finding=f"From step {probes[0]} to step {probes[-1]} the mean of the points moves {listed(displacements)}.",
        note=(
            "A point is a row of the data; the rows are always the same. P2 learns from y1 and y2, two of the outputs "
            f"of P1, and they move while P1 learns. Pale: their positions at step {probes[0]}. First seed."
        ),
        chain=["data", f"P1: {one}", "y1, y2, ...", f"P2: {two}", "prediction"],
        plots=[
            Plot(
                LABELS[arm].capitalize(),
                Axis("y1", fixed_over=["step"]),
                Axis("y2", fixed_over=["step"]),
                _series(arm, by_probe),
            )
            for arm, by_probe in arms.items()
        ],
        controls=[Slider("step", "Training", [(str(i), f"step {step}") for i, step in enumerate(probes)])],
        table=FigureTable(
            ["step", *(f"mean y1, y2, {LABELS[arm]}" for arm in arms)],
            [
                [str(step), *(", ".join(shown(value) for value in _center(by_probe[i])) for by_probe in arms.values())]
                for i, step in enumerate(probes)
            ],
        ),
        data=Data(
            "the inputs of P2",
            ["arm", "step", "row", "y1", "y2"],
            [
                [arm, probes[i], k, *row]
                for arm, by_probe in arms.items()
                for i, rows in enumerate(by_probe)
                for k, row in enumerate(rows, 1)
            ],
        ),
    )
