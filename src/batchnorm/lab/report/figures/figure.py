"""The form of a figure: its data, apart from how a browser draws and colours it."""

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
    "Mark",
    "Plot",
    "Rule",
    "Series",
    "Surface",
    "Table",
    "Value",
    "listed",
    "shown",
]

LABELS = {"none": "without batch norm", "before": "batch norm before", "after": "batch norm after"}
PHRASES = {"none": "without batch norm", "before": "with it before the nonlinearity", "after": "with it after"}
GROUPS = LABELS | {
    "raw": "raw inputs",
    "normalized": "normalized inputs",
    "theory": "what independent rows give",
    "pair": "one seed",
    "descent": "gradient descent",
}

Value = float | None
Mark = Literal["known", "at least", "at most", "beyond", "minimum"]


@dataclass(frozen=True)
class Series:
    """The numbers of one group, an arm most often, in a plot.

    Parameters
    ----------
    group : str
        Whose, a key of `GROUPS`; it sets colour, dash and marker.
    x, y : sequence of numbers
        In units of the axes; None leaves a gap.
    low, high : sequence of numbers, optional
        A band about y.
    line : bool
        Whether the points are joined.
    marks : sequence of str, optional
        How each point is known, which sets its symbol; without it points have none.
    text : sequence of str, optional
        What is said of each point under the pointer, in place of its number.
    choice : mapping of str to str, optional
        The options of the figure's controls that show the series, all of them together.
    faint : bool
        Whether it is drawn pale, as what the others are to be seen against.
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
        Whose; it sets the colour.
    x, y : sequence of numbers
        The grid.
    above : sequence of sequence of numbers
        Heights above the lowest there is, a row for each y.
    levels : sequence of numbers
        Heights at which there is a contour, equal factors apart.
    """

    group: str
    x: Sequence[float]
    y: Sequence[float]
    above: Sequence[Sequence[float]]
    levels: Sequence[float]


@dataclass(frozen=True)
class Axis:
    """An axis: its title, its scale, and what it counts.

    ``time`` is "steps", "seconds" or "chosen" by the reader where the numbers are gradient steps; ``switch`` names
    the control that changes the scale; ``ticks`` are (value, label) where they are given; ``range`` is in the units
    of the axis; a ``shared`` axis has the limits that hold every plot of the figure; a control that it is ``held``
    against leaves its limits as they are, those that hold all of the control's options; on an ``equal`` axis a unit is
    as long as on the other.
    """

    title: str
    scale: Literal["linear", "log"] = "linear"
    time: Literal["steps", "seconds", "chosen"] | None = None
    switch: Literal["x", "y"] | None = None
    ticks: Sequence[tuple[float, str]] | None = None
    range: tuple[float, float] | None = None
    shared: bool = False
    held: Sequence[str] = ()
    equal: bool = False


@dataclass(frozen=True)
class Rule:
    """A line across a plot at one value of an axis, with a word beside it; beyond it the plot may be shaded."""

    axis: Literal["x", "y"]
    value: float
    label: str
    beyond: bool = False


@dataclass(frozen=True)
class Plot:
    """One pair of axes with the series in them."""

    title: str
    x: Axis
    y: Axis
    series: Sequence[Series]
    rules: Sequence[Rule] = ()
    surface: Surface | None = None


@dataclass(frozen=True)
class Table:
    """The numbers of a figure for those who would rather read them."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Figure:
    """A figure of the report: what it asks, what it finds in one sentence, its plots and its numbers.

    ``chain`` names parts of a network, in the order in which data pass them, for a small diagram above the plots;
    ``data`` is what can be saved as a file.
    """

    key: str
    title: str
    finding: str
    note: str
    plots: Sequence[Plot]
    table: Table
    controls: Sequence[Control] = ()
    replay: bool = False
    chain: Sequence[str] = ()
    data: Data | None = None

    @property
    def groups(self) -> list[str]:
        """The groups to tell apart in a plot."""
        many = [plot for plot in self.plots if len({series.group for series in plot.series}) > 1]
        return list(dict.fromkeys(series.group for plot in many for series in plot.series))

    def drawing(self) -> dict[str, Any]:
        """What the browser draws: the plots as plain values of 5 digits."""
        return {
            "key": self.key,
            "groups": self.groups,
            "controls": [control.drawing() for control in self.controls],
            "plots": [_plain(asdict(plot)) for plot in self.plots],
        }


def _plain(value: Any) -> Any:
    """The value without what is not set, and with numbers as JSON has them."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items() if item is not None}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return float(f"{value:.5g}") if math.isfinite(value) else None
    return value


def shown(value: Value) -> str:
    """A number of a table: four digits, or a dash where there is none."""
    return f"{value:.4g}" if value is not None and math.isfinite(value) else "-"


def listed(parts: Sequence[str]) -> str:
    """Parts of a sentence with commas and a last "and".

    >>> listed(["a", "b", "c"])
    'a, b and c'
    """
    return ", ".join(parts[:-1]) + " and " + parts[-1] if len(parts) > 1 else "".join(parts)
