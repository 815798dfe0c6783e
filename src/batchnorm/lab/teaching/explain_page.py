"""The worked example as one offline page to teach from, on which rows and numbers can be changed.

The page calculates by itself, in templates/explain_arithmetic.js; tests compare its numbers with the library's layer.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined

from batchnorm.errors import RunError
from batchnorm.lab.files import write_file
from batchnorm.lab.teaching.figures import ExampleRow, Figures, KeptNumbers
from batchnorm.lab.training.network import ACTIVATIONS

__all__ = ["ExplainPage", "PageStart", "Slider", "page_data", "write_page"]

SUFFIXES = (".html", ".htm")
MAX_BATCHES = 100


@dataclass(frozen=True)
class Slider:
    """A number that readers of the page can move.

    Attributes
    ----------
    key : str
        Name in the page.
    meaning : str
        Meaning in words, for readers who can't see the symbol.
    value, low, high, step : float
        Initial value, range and step; a number typed beside the slider may lie outside of the range.
    power : bool
        Whether low, high and step refer to log10 of the value.
    """

    key: str
    meaning: str
    value: float
    low: float
    high: float
    step: float
    power: bool = False


@dataclass(frozen=True)
class PageStart:
    """Initial state of the page, as its script reads it.

    Attributes
    ----------
    features : list of list of float
    target : list of float or None
    weights : list of float
    bias, gamma, beta, eps, momentum, learning_rate : float
    activation : str
    batches : int
        Number of batches that the running statistics have seen.
    assumed : list of str
        Paths of the inputs of assumed cells.
    """

    features: list[list[float]]
    target: list[float | None] | None
    weights: list[float]
    bias: float
    gamma: float
    beta: float
    eps: float
    momentum: float | None
    activation: str
    learning_rate: float
    batches: int
    assumed: list[str]

    def to_json(self) -> dict[str, Any]:
        """Return the values by the names that the script uses."""
        values = asdict(self)
        return values | {"learningRate": values.pop("learning_rate")}


@dataclass(frozen=True)
class ExplainPage:
    """Everything that the page starts from, apart from its HTML."""

    names: list[str]
    target: str | None
    rows: list[ExampleRow]
    remarks: list[str]
    assumed: list[str]
    chosen_by_us: bool
    sliders: list[Slider]
    batches: Slider
    activations: list[str]
    kept: KeptNumbers
    start: PageStart

    def to_json(self) -> dict[str, Any]:
        """Return the values that the script of the page reads."""
        return {"names": self.names, "target": self.target, "start": self.start.to_json(), "kept": asdict(self.kept)}


def _weight(key: str, name: str, value: float) -> Slider:
    """Return a slider over about four times the weight in both directions, one of whose stops is the weight."""
    size = 10.0 ** round(math.log10(abs(value))) if value else 1.0
    return Slider(key, f"weight of {name}", value, -4 * size, 4 * size, size / 20)


def page_data(example: Figures) -> ExplainPage:
    """Return the data that the page of a worked example starts from."""
    neuron, before, names = example.neuron, example.before, example.features
    (w1, w2), b = neuron.weights, neuron.bias
    return ExplainPage(
        names=names,
        target=example.target,
        rows=example.rows,
        remarks=example.remarks,
        assumed=[f"{name} of row {row.row}" for row in example.rows for name in row.assumed],
        chosen_by_us=neuron.chosen_by_us,
        sliders=[
            _weight("w1", names[0], w1),
            _weight("w2", names[1], w2),
            Slider("b", "the neuron's bias", b, b - 10, b + 10, 0.1),
            Slider("gamma", "scale, learned", before.gamma, -3, 3, 0.05),
            Slider("beta", "shift, learned", before.beta, -3, 3, 0.05),
            Slider("eps", "added to the variance", example.eps, -10, 0, 0.5, power=True),
        ],
        batches=Slider("batches", "batches seen in training", 1, 0, MAX_BATCHES, 1),
        activations=list(ACTIVATIONS),
        kept=example.kept,
        start=PageStart(
            features=[row.features for row in example.rows],
            target=None if example.target is None else [row.target for row in example.rows],
            weights=[w1, w2],
            bias=b,
            gamma=before.gamma,
            beta=before.beta,
            eps=example.eps,
            momentum=example.momentum,
            activation=neuron.activation,
            learning_rate=example.learning_rate,
            batches=1,
            assumed=_assumed_inputs(example),
        ),
    )


def _assumed_inputs(example: Figures) -> list[str]:
    """Return the paths by which the page knows the inputs of the assumed cells."""
    paths = {name: f"features.{{}}.{column}" for column, name in enumerate(example.features)}
    if example.target is not None:
        paths[example.target] = "target.{}"
    return [paths[name].format(i) for i, row in enumerate(example.rows) for name in row.assumed]


def _checked(path: Path) -> Path:
    """Return the file to write, once it is sure that no other file would be lost; a link is followed."""
    if path.suffix.lower() not in SUFFIXES:
        raise RunError(f"html must name an .html file; got {str(path)!r}")
    try:
        broken_rule = _broken_rule(path)
        target = path.resolve() if path.is_symlink() else path
    except (OSError, RuntimeError) as error:  # pathlib raises RuntimeError for links that form a circle
        reason = error.strerror if isinstance(error, OSError) else "its links form a circle"
        raise RunError(f"html must name a file that can be written; {str(path)!r}: {reason}") from error
    if broken_rule is not None:
        raise RunError(f"html must name {broken_rule}")
    return target


def _broken_rule(path: Path) -> str | None:
    if path.is_dir():
        return f"a file; {str(path)!r} is a folder"
    if path.exists() and not path.is_file():
        return f"a file; {str(path)!r} is a device or a pipe"
    if not path.parent.is_dir():
        return f"a file in a folder that exists; there is no folder {str(path.parent)!r}"
    return None


def write_page(example: Figures, html: Path) -> None:
    """Write the page of a worked example atomically.

    Parameters
    ----------
    example : Figures
        The worked example that the page starts from.
    html : Path
        An .html file; an existing one is replaced.

    Raises
    ------
    RunError
        It is not an .html file, it is a folder, its folder is missing or can't be written to, or the disk is full. An
        existing file stays as it was.
    """
    path = _checked(html)
    page = page_data(example)
    templates = Environment(
        loader=ChoiceLoader([PackageLoader("batchnorm.lab.teaching"), PackageLoader("batchnorm.lab")]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
    )
    templates.filters["number"] = _html_number
    write_file(path, templates.get_template("explain.html").render(page=page))


def _html_number(value: float) -> str:
    """Write a number for an input of HTML: without exponent, to 15 digits, so that 0.15 does not end in ...02."""
    text = f"{value:.15g}"
    return f"{Decimal(text):f}" if 1e-7 < abs(value) < 1e16 else text
