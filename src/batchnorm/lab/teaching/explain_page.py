"""The worked example as one offline page to teach from: its rows and numbers can be changed, and all follows.

The page calculates by itself, in teaching/templates/explain_arithmetic.js; tests hold that to the library's layer.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined

from batchnorm.errors import RunError
from batchnorm.lab.files import write_file
from batchnorm.lab.teaching.worked_example import WorkedExample
from batchnorm.lab.training.network import ACTIVATIONS

__all__ = ["ExplainPage", "Slider", "page_data", "write_page"]

SUFFIXES = (".html", ".htm")
MOST_BATCHES = 100


@dataclass(frozen=True)
class Slider:
    """A number that the page lets its reader move.

    Attributes
    ----------
    key : str
        Its name in the page.
    meaning : str
        In words, for whoever can't see the symbol.
    value, low, high, step : float
        Where it starts, and what the slider reaches; a number typed beside it may lie beyond.
    power : bool
        Whether low, high and step are of log10 of the value.
    """

    key: str
    meaning: str
    value: float
    low: float
    high: float
    step: float
    power: bool = False


@dataclass(frozen=True)
class ExplainPage:
    """Everything that the page starts from, apart from its HTML."""

    names: list[str]
    target: str | None
    rows: list[dict[str, Any]]
    assumed: list[str]
    chosen_by_us: bool
    sliders: list[Slider]
    batches: Slider
    activations: list[str]
    kept: dict[str, Any]
    start: dict[str, Any]


def _weight(key: str, name: str, value: float) -> Slider:
    """A slider over a few times the weight, in both directions, that stops at it."""
    size = 10.0 ** round(math.log10(abs(value))) if value else 1.0
    return Slider(key, f"weight of {name}", value, -4 * size, 4 * size, size / 20)


def page_data(example: WorkedExample) -> ExplainPage:
    """What the page of a worked example starts from."""
    figures = example.figures
    neuron, before = figures["neuron"], figures["before"]
    (w1, w2), b = neuron["weights"], neuron["bias"]
    names = figures["features"]
    return ExplainPage(
        names=names,
        target=figures["target"],
        rows=figures["rows"],
        assumed=[f"{name} of row {row['row']}" for row in figures["rows"] for name in row["assumed"]],
        chosen_by_us=neuron["chosen_by_us"],
        sliders=[
            _weight("w1", names[0], w1),
            _weight("w2", names[1], w2),
            Slider("b", "the neuron's bias", b, b - 10, b + 10, 0.1),
            Slider("gamma", "scale, learned", before["gamma"], -3, 3, 0.05),
            Slider("beta", "shift, learned", before["beta"], -3, 3, 0.05),
            Slider("eps", "added to the variance", figures["eps"], -10, 0, 0.5, power=True),
        ],
        batches=Slider("batches", "batches seen in training", 1, 0, MOST_BATCHES, 1),
        activations=list(ACTIVATIONS),
        kept=figures["kept"],
        start={
            "features": [row["features"] for row in figures["rows"]],
            "target": None if figures["target"] is None else [row["target"] for row in figures["rows"]],
            "weights": [w1, w2],
            "bias": b,
            "gamma": before["gamma"],
            "beta": before["beta"],
            "eps": figures["eps"],
            "momentum": figures["momentum"],
            "activation": neuron["activation"],
            "learningRate": figures["learning_rate"],
            "batches": 1,
            "assumed": _assumed(figures),
        },
    )


def _assumed(figures: dict[str, Any]) -> list[str]:
    """The assumed cells, as the page calls its inputs."""
    places = {name: f"features.{{}}.{column}" for column, name in enumerate(figures["features"])}
    if figures["target"] is not None:
        places[figures["target"]] = "target.{}"
    return [places[name].format(i) for i, row in enumerate(figures["rows"]) for name in row["assumed"]]


def _checked(path: Path) -> Path:
    """The file to write, once it is sure that nothing but a page would be lost; a link is followed."""
    if path.suffix.lower() not in SUFFIXES:
        raise RunError(f"--html must name an .html file; got {str(path)!r}")
    try:
        if path.is_dir():
            raise RunError(f"--html must name a file; {str(path)!r} is a folder")
        if path.exists() and not path.is_file():
            raise RunError(f"--html must name a file; {str(path)!r} is a device or a pipe")
        if not path.parent.is_dir():
            raise RunError(f"--html must name a file in a folder that exists; there is no folder {str(path.parent)!r}")
        return path.resolve() if path.is_symlink() else path
    except (OSError, RuntimeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "its links lead in a circle"
        raise RunError(f"--html must name a file that can be written; {str(path)!r}: {reason}") from error


def write_page(example: WorkedExample, path: Path) -> None:
    """Write the page of a worked example, whole or not at all.

    Parameters
    ----------
    example : WorkedExample
        The rows and numbers that the page starts from.
    path : Path
        An .html file; one that is there is replaced.

    Raises
    ------
    RunError
        Not an .html file, a folder, a folder that is missing or can't be written to, a full disk. What was there
        stays as it was.
    """
    path = _checked(path)
    page = page_data(example)
    templates = Environment(
        loader=ChoiceLoader([PackageLoader("batchnorm.lab.teaching"), PackageLoader("batchnorm.lab")]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
    )
    templates.filters["plain"] = _plain
    write_file(path, templates.get_template("explain.html").render(page=page))


def _plain(value: float) -> str:
    """A number as an input of HTML takes it: to 15 digits, so that 0.15 does not end in ...02, and without exponent."""
    text = f"{value:.15g}"
    return f"{Decimal(text):f}" if 1e-7 < abs(value) < 1e16 else text
