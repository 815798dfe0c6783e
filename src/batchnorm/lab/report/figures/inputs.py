"""The notes' picture of why inputs are normalized: the loss over two weights, and the way of gradient descent on it."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np

from batchnorm.lab.comparison.verdict import number
from batchnorm.lab.report.figures.controls import Slider
from batchnorm.lab.report.figures.downloads import Data
from batchnorm.lab.report.figures.evidence import Evidence
from batchnorm.lab.report.figures.figure import GROUPS, Axis, Figure, Plot, Series, Surface, Table, shown

__all__ = ["inputs"]

LEVELS = 11
LOWEST_SHARE = 0.05  # of the grid that lies below the first contour: a narrower valley falls between the points
MOST_STRETCHED = 3.0
MOST_DIGITS = 1e6
MOST_MOMENTS = 40


def _steps(values: dict[str, Any]) -> str:
    """Steps to the minimum in words."""
    steps = values["steps"]
    if steps is None or not math.isfinite(steps):
        return "no number of steps gets there"
    return f"{_round(steps)} step" + ("" if steps == 1 else "s")


def _round(value: float) -> str:
    """A number in digits that can be taken in."""
    return number(value) if value < MOST_DIGITS else f"{value:.1e}"


def _surface(group: str, values: dict[str, Any]) -> Surface:
    """The loss above its least, with contours from a narrow strip along the valley to the highest point."""
    loss = np.array(values["loss"], dtype=float)
    above = loss - loss.min()
    lowest = max(float(np.quantile(above, LOWEST_SHARE)), float(above.max()) * 1e-9)
    return Surface(
        group, values["x"], values["y"], above.tolist(), np.geomspace(lowest, above.max(), LEVELS)[:-1].tolist()
    )


def _equal(values: dict[str, Any]) -> bool:
    """Whether the plot is legible where both weights are drawn to one scale."""
    wide, high = (values[name][-1] - values[name][0] for name in ("x", "y"))
    return bool(1 / MOST_STRETCHED <= wide / high <= MOST_STRETCHED)


def _moments(both: dict[str, dict[str, Any]]) -> list[int]:
    """Steps at which the slider stops: some of those that either path has a point of, until the slower arrives."""
    last = max(values["steps"] if values["steps"] is not None else math.inf for values in both.values())
    every = sorted({int(step) for values in both.values() for step in values.get("path_steps", ()) if step <= last})
    chosen = np.unique(np.linspace(0, len(every) - 1, min(len(every), MOST_MOMENTS)).round().astype(int))
    return [every[i] for i in chosen]


def _plot(group: str, values: dict[str, Any], moments: list[int], equal: bool) -> Plot:
    path, points = values["path"], values.get("path_steps", [])
    series = [Series("descent", [w1 for w1, _ in path], [w2 for _, w2 in path], faint=True)]
    for i, moment in enumerate(moments):
        at = max((k for k, step in enumerate(points) if step <= moment), default=0)
        w1, w2 = path[at]
        said = [f"step {_round(moment)}: w1 = {shown(w1)}, w2 = {shown(w2)}"]
        series.append(Series("descent", [w1], [w2], line=False, marks=["known"], text=said, choice={"step": str(i)}))
    w1, w2 = values["minimum"]
    series.append(Series("descent", [w1], [w2], line=False, marks=["minimum"], text=["the minimum"]))
    return Plot(
        f"{GROUPS[group].capitalize()}: {_steps(values)}",
        Axis("w1", range=(values["x"][0], values["x"][-1]), equal=equal),
        Axis("w2", range=(values["y"][0], values["y"][-1])),
        series,
        surface=_surface(group, values),
    )


def inputs(_: Evidence, details: dict[str, Any]) -> Figure | None:
    """Contours of the loss with raw and with normalized inputs; None where they could not be measured."""
    if "raw" not in details:
        return None
    both = {group: details[group] for group in ("raw", "normalized")}
    moments = _moments(both)
    equal = all(_equal(values) for values in both.values())
    first, second = details["columns"]
    conditions = {group: _round(values["condition"]) for group, values in both.items()}
    scale = "Both weights are drawn to one scale" if equal else "The weights are drawn to scales of their own"
    return Figure(
        key="contours",
        title="The loss over two weights",
        finding=(
            f"The largest curvature of the loss is {conditions['raw']} times the least with raw and "
            f"{conditions['normalized']} times with normalized inputs."
        ),
        note=(
            f"The loss of one linear neuron, w1 * {first} + w2 * {second}, on {details['told_apart']}. A contour is a "
            "height of the loss above its least, each the same factor above the one inside it; the star is the "
            f"minimum, the line the way of gradient descent from w = 0. {scale}."
        ),
        plots=[_plot(group, values, moments, equal) for group, values in both.items()],
        controls=[
            Slider("step", "Gradient descent", [(str(i), f"step {_round(step)}") for i, step in enumerate(moments)])
        ]
        if moments
        else [],
        table=Table(
            [
                "inputs",
                "steps to the minimum",
                "largest over least curvature",
                "w1 at the minimum",
                "w2 at the minimum",
            ],
            [
                [GROUPS[group], _steps(values), conditions[group], *(shown(weight) for weight in values["minimum"])]
                for group, values in both.items()
            ],
        ),
        data=Data(
            "the loss, and the way of gradient descent on it",
            ["inputs", "what", "step", "w1", "w2", "loss"],
            [
                *(
                    [group, "gradient descent", step, *point, None]
                    for group, values in both.items()
                    for step, point in itertools.zip_longest(values.get("path_steps", ()), values["path"])
                ),
                *(
                    [group, "loss", None, w1, w2, values["loss"][j][i]]
                    for group, values in both.items()
                    for j, w2 in enumerate(values["y"])
                    for i, w1 in enumerate(values["x"])
                ),
            ],
        ),
    )
