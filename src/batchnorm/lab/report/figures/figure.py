"""The data of a figure, apart from how a browser draws and colors it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from batchnorm.lab.report.figures.controls import Control
from batchnorm.lab.report.figures.downloads import Data

__all__ = [
    "GROUPS",
    "LABELS",
    "PHRASES",
    "Axis",
    "Figure",
    "FigureTable",
    "Mark",
    "Plot",
    "ReferenceLine",
    "Series",
    "Surface",
    "Value",
    "listed",
    "shown",
]

LABELS = {"none": "without batch norm", "before": "batch norm before", "after": "batch norm after"}
PHRASES = {"none": "without batch norm", "before": "with it before the nonlinearity", "after": "with it after"}
GROUPS = LABELS | {
    "raw": "raw inputs",
    "normalized": "normalized inputs",
    "theory": "independent rows",
    "pair": "one seed",
    "descent": "gradient descent",
}

Value = float | None
Mark = Literal["known", "at least", "at most", "beyond", "minimum"]


@dataclass(frozen=True)
class Series:
    """The numbers of one group in a plot; most groups are arms.

    Parameters
    ----------
    group : str
        The group, a key of `GROUPS`; it sets color, dash and marker.
    x, y : sequence of numbers
        In units of the axes; None leaves a gap.
    low, high : sequence of numbers, optional
        A band around y.
    line : bool
        Whether the points are joined.
    marks : sequence of str, optional
        How each point is known, which sets its symbol; without marks the points have no symbols.
    text : sequence of str, optional
        The text of each point under the pointer, instead of its number.
    choice : mapping of str to str, optional
        The options of the controls that must all be chosen for the series to be shown.
    faint : bool
        Whether the series is drawn pale, as a background for the others.
    """

    group: str
    x: Sequence[Value]
    y: Sequence[Value]
    low: Sequence[Value] | None = None
    high: Sequence[Value] | None = None
    line: bool = True
    marks: Sequence[Mark] | None = None
    text: Sequence[str] | None = None
    choice: Mapping[str, str] | None = None
    faint: bool = False


@dataclass(frozen=True)
class Surface:
    """Heights over a plane, drawn as contours behind the series of a plot.

    Parameters
    ----------
    group : str
        The group; it sets the color.
    x, y : sequence of numbers
        The grid.
    above : sequence of sequence of numbers
        Heights above the lowest one, a row per y.
    levels : sequence of numbers
        Heights of the contours, equal factors apart.
    """

    group: str
    x: Sequence[float]
    y: Sequence[float]
    above: Sequence[Sequence[float]]
    levels: Sequence[float]


@dataclass(frozen=True)
class Axis:
    """An axis of a plot.

    Parameters
    ----------
    title : str
    scale : "linear" or "log"
    time : "steps", "seconds" or "chosen", optional
        The unit where the numbers are gradient steps; "chosen" lets the reader choose.
    switch : "x" or "y", optional
        The control that changes the scale.
    ticks : sequence of (float, str), optional
        Values and their labels.
    range : (float, float), optional
        Limits, in the units of the axis.
    shared : bool
        Whether the limits fit every plot of the figure.
    fixed_over : sequence of str
        Controls that leave the limits unchanged: the limits fit all of their options.
    equal : bool
        Whether a unit is as long as on the other axis.
    """

    title: str
    scale: Literal["linear", "log"] = "linear"
    time: Literal["steps", "seconds", "chosen"] | None = None
    switch: Literal["x", "y"] | None = None
    ticks: Sequence[tuple[float, str]] | None = None
    range: tuple[float, float] | None = None
    shared: bool = False
    fixed_over: Sequence[str] = ()
    equal: bool = False


@dataclass(frozen=True)
class ReferenceLine:
    """A line across a plot at one value of an axis, with a label; ``beyond`` shades the plot past the line."""

    axis: Literal["x", "y"]
    value: float
    label: str
    beyond: bool = False


@dataclass(frozen=True)
class Plot:
    """A pair of axes with the series in them."""

    title: str
    x: Axis
    y: Axis
    series: Sequence[Series]
    lines: Sequence[ReferenceLine] = ()
    surface: Surface | None = None


@dataclass(frozen=True)
class FigureTable:
    """The numbers of a figure as a table to read."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Figure:
    """A figure of the report.

    Parameters
    ----------
    key, title : str
    finding : str
        The result in one sentence.
    note : str
        How to read the figure.
    plots : sequence of Plot
    table : FigureTable
    controls : sequence of Control
    replay : bool
        Whether the curves can be drawn step by step.
    chain : sequence of str
        Parts of a network, in the order in which data pass through them, for a small diagram above the plots.
    data : Data, optional
        The data that can be saved as a file.
    """

    key: str
    title: str
    finding: str
    note: str
    plots: Sequence[Plot]
    table: FigureTable
    controls: Sequence[Control] = ()
    replay: bool = False
    chain: Sequence[str] = ()
    data: Data | None = None

    @property
    def groups(self) -> list[str]:
        """The groups that a reader must tell apart in a plot."""
        many = [plot for plot in self.plots if len({series.group for series in plot.series}) > 1]
        return list(dict.fromkeys(series.group for plot in many for series in plot.series))

    def drawing(self) -> dict[str, object]:
        """Return what the browser draws: the plots as JSON values of 5 digits."""
        return {
            "key": self.key,
            "groups": self.groups,
            "controls": [control.drawing() for control in self.controls],
            "plots": [_drawn(asdict(plot)) for plot in self.plots],
        }


def _drawn(value: Any) -> Any:
    """Return the value without unset parts, and with numbers of 5 digits that JSON can hold."""
    if isinstance(value, dict):
        return {key: _drawn(item) for key, item in value.items() if item is not None}
    if isinstance(value, list | tuple):
        return [_drawn(item) for item in value]
    if isinstance(value, float):
        return float(f"{value:.5g}") if math.isfinite(value) else None
    return value


def shown(value: Value) -> str:
    """Return a number of a table: four digits, or a dash where it is missing or not finite."""
    return f"{value:.4g}" if value is not None and math.isfinite(value) else "-"


def listed(parts: Sequence[str]) -> str:
    """Return the parts of a sentence, joined by commas and a last "and".

    >>> listed(["a", "b", "c"])
    'a, b and c'
    """
    return ", ".join(parts[:-1]) + " and " + parts[-1] if len(parts) > 1 else "".join(parts)
