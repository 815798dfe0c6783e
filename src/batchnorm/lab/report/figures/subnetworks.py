"""The notes' picture of internal covariate shift: what sub-network P1 hands to P2 moves while P1 learns."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from batchnorm.lab.report.figures.bands import of_arms
from batchnorm.lab.report.figures.controls import Slider
from batchnorm.lab.report.figures.downloads import Data
from batchnorm.lab.report.figures.evidence import Evidence
from batchnorm.lab.report.figures.figure import LABELS, PHRASES, Axis, Figure, Plot, Series, Table, listed, shown

__all__ = ["subnetworks"]


def _series(arm: str, by_probe: list[list[list[float]]]) -> list[Series]:
    """The rows as points at every probe, in front of where they were at the first."""

    def points(rows: list[list[float]], **options: Any) -> Series:
        x, y = ([row[i] for row in rows] for i in (0, 1))
        return Series(arm, x, y, line=False, marks=["known"] * len(rows), **options)

    moving = [points(rows, choice={"step": str(i)}) for i, rows in enumerate(by_probe)]
    return [points(by_probe[0], faint=True), *moving]


def _centre(rows: list[list[float]]) -> tuple[float, float]:
    """Mean of the points; not finite where the run has diverged."""
    values = np.array(rows, dtype=float)
    return float(values[:, 0].mean()), float(values[:, 1].mean())


def _moved(by_probe: list[list[list[float]]]) -> str:
    """How far the middle of the points has moved from the first probe to the last."""
    distance = math.dist(_centre(by_probe[0]), _centre(by_probe[-1]))
    return f"by {distance:.2g}" if math.isfinite(distance) else "out of bounds"


def subnetworks(evidence: Evidence, details: dict[str, Any]) -> Figure | None:
    """Two outputs of P1 over training, each arm in a plot; None where they were not recorded or are not two."""
    outputs = details.get("outputs")
    arms = of_arms(outputs["rows"] if outputs else {})
    if not outputs or not arms or any(len(row) < 2 for row in next(iter(arms.values()))[0]):
        return None
    probes, last = details["probes"], outputs["layer"]
    first, hidden = int(last.rsplit(" ", 1)[1]), len(evidence.settings.hidden)
    one = "hidden layer 1" if first == 1 else f"hidden layers 1 to {first}"
    rest = [f"hidden layer {n}" if first + 1 == hidden else f"hidden layers {first + 1} to {hidden}" for n in [hidden]]
    two = listed([*(rest if first < hidden else []), "output layer"])
    moved = [f"{_moved(by_probe)} {PHRASES[arm]}" for arm, by_probe in arms.items()]
    return Figure(
        key="subnetworks",
        title="What P2 sees while P1 learns",
        finding=f"From step {probes[0]} to step {probes[-1]} the middle of the points moves {listed(moved)}.",
        note=(
            "A point is a row of the data, always the same rows: y1 and y2, two of the outputs of P1, are what P2 has "
            f"to learn from, and they move while P1 learns. Pale: where they were at step {probes[0]}. First seed."
        ),
        chain=["data", f"P1: {one}", "y1, y2, ...", f"P2: {two}", "prediction"],
        plots=[
            Plot(
                LABELS[arm].capitalize(),
                Axis("y1", held=["step"]),
                Axis("y2", held=["step"]),
                _series(arm, by_probe),
            )
            for arm, by_probe in arms.items()
        ],
        controls=[Slider("step", "Training", [(str(i), f"step {step}") for i, step in enumerate(probes)])],
        table=Table(
            ["step", *(f"mean y1, y2, {LABELS[arm]}" for arm in arms)],
            [
                [str(step), *(", ".join(shown(value) for value in _centre(by_probe[i])) for by_probe in arms.values())]
                for i, step in enumerate(probes)
            ],
        ),
        data=Data(
            "the points that P2 sees",
            ["arm", "step", "row", "y1", "y2"],
            [
                [arm, probes[i], k, *row]
                for arm, by_probe in arms.items()
                for i, rows in enumerate(by_probe)
                for k, row in enumerate(rows, 1)
            ],
        ),
    )
