"""Figure of why inputs are normalized: the loss over two weights, and the path of gradient descent on it."""

from __future__ import annotations

import itertools
import math

import numpy as np

from batchnorm.lab.claims.inputs import InputsDetails, LossSurface
from batchnorm.lab.comparison.verdict import number
from batchnorm.lab.report.figures.controls import Slider
from batchnorm.lab.report.figures.downloads import Data
from batchnorm.lab.report.figures.evidence import Evidence
from batchnorm.lab.report.figures.figure import GROUPS, Axis, Figure, FigureTable, Plot, Series, Surface, shown

__all__ = ["inputs"]

LEVELS = 11
LOWEST_SHARE = 0.05  # of the grid that lies below the first contour: a narrower valley falls between the points
MOST_STRETCHED = 3.0
MOST_DIGITS = 1e6
MOST_STOPS = 40


def _steps(surface: LossSurface) -> str:
    """Return the steps to the minimum in words."""
    if not math.isfinite(surface.steps):
        return "no number of steps gets there"
    return f"{_round(surface.steps)} step" + ("" if surface.steps == 1 else "s")


def _round(value: float) -> str:
    """Return a number in few digits."""
    return number(value) if value < MOST_DIGITS else f"{value:.1e}"


def _surface(group: str, surface: LossSurface) -> Surface:
    """Return the loss above its least, with contours from a narrow strip along the valley to the highest point."""
    loss = np.array(surface.loss, dtype=float)
    above = loss - loss.min()
    lowest = max(float(np.quantile(above, LOWEST_SHARE)), float(above.max()) * 1e-9)
    return Surface(group, surface.x, surface.y, above.tolist(), np.geomspace(lowest, above.max(), LEVELS)[:-1].tolist())


def _fits_one_scale(surface: LossSurface) -> bool:
    """Return whether the plot is legible with both weights drawn to one scale."""
    wide, high = (grid[-1] - grid[0] for grid in (surface.x, surface.y))
    return bool(1 / MOST_STRETCHED <= wide / high <= MOST_STRETCHED)


def _stops(both: dict[str, LossSurface]) -> list[int]:
    """Return the steps of the slider: some of those at which either path has a point, until the slower one arrives."""
    last = max(math.inf if math.isnan(surface.steps) else surface.steps for surface in both.values())
    steps = sorted({int(step) for surface in both.values() for step in surface.path_steps if step <= last})
    chosen = np.unique(np.linspace(0, len(steps) - 1, min(len(steps), MOST_STOPS)).round().astype(int))
    return [steps[i] for i in chosen]


def _plot(group: str, surface: LossSurface, stops: list[int], equal: bool) -> Plot:
    path, points = surface.path, surface.path_steps
    series = [Series("descent", [w1 for w1, _ in path], [w2 for _, w2 in path], faint=True)]
    for i, stop in enumerate(stops):
        at = max((k for k, step in enumerate(points) if step <= stop), default=0)
        w1, w2 = path[at]
        text = [f"step {_round(stop)}: w1 = {shown(w1)}, w2 = {shown(w2)}"]
        series.append(Series("descent", [w1], [w2], line=False, marks=["known"], text=text, choice={"step": str(i)}))
    w1, w2 = surface.minimum
    series.append(Series("descent", [w1], [w2], line=False, marks=["minimum"], text=["the minimum"]))
    return Plot(
        f"{GROUPS[group].capitalize()}: {_steps(surface)}",
        Axis("w1", range=(surface.x[0], surface.x[-1]), equal=equal),
        Axis("w2", range=(surface.y[0], surface.y[-1])),
        series,
        surface=_surface(group, surface),
    )


def inputs(_: Evidence, details: InputsDetails) -> Figure:
    """Return the contours of the loss with raw and with normalized inputs."""
    both = {"raw": details.raw, "normalized": details.normalized}
    stops = _stops(both)
    equal = all(_fits_one_scale(surface) for surface in both.values())
    first, second = details.columns
    conditions = {group: _round(surface.condition) for group, surface in both.items()}
    scale = "Both weights are drawn to one scale" if equal else "The weights are drawn to scales of their own"
    return Figure(
        key="contours",
        title="The loss over two weights",
        finding=(
            f"The largest curvature of the loss is {conditions['raw']} times the least with raw and "
            f"{conditions['normalized']} times with normalized inputs."
        ),
        note=(
            f"The loss of one linear neuron, w1 * {first} + w2 * {second}, on {details.told_apart}. A contour is a "
            "height of the loss above its least, each the same factor above the one inside it; the star is the "
            f"minimum, the line the path of gradient descent from w = 0. {scale}."
        ),
        plots=[_plot(group, surface, stops, equal) for group, surface in both.items()],
        controls=[
            Slider("step", "Gradient descent", [(str(i), f"step {_round(step)}") for i, step in enumerate(stops)])
        ]
        if stops
        else [],
        table=FigureTable(
            [
                "inputs",
                "steps to the minimum",
                "largest over least curvature",
                "w1 at the minimum",
                "w2 at the minimum",
            ],
            [
                [GROUPS[group], _steps(surface), conditions[group], *(shown(weight) for weight in surface.minimum)]
                for group, surface in both.items()
            ],
        ),
        data=Data(
            "the loss, and the path of gradient descent on it",
            ["inputs", "quantity", "step", "w1", "w2", "loss"],
            [
                *(
                    [group, "gradient descent", step, *point, None]
                    for group, surface in both.items()
                    for step, point in itertools.zip_longest(surface.path_steps, surface.path)
                ),
                *(
                    [group, "loss", None, w1, w2, surface.loss[j][i]]
                    for group, surface in both.items()
                    for j, w2 in enumerate(surface.y)
                    for i, w1 in enumerate(surface.x)
                ),
            ],
        ),
    )
