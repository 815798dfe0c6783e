"""Figure of the distribution of the inputs of each nonlinearity over training."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np

from batchnorm.lab.claims.shift import ShiftDetails
from batchnorm.lab.comparison.verdict import number
from batchnorm.lab.report.figures.bands import in_order_of_arms, short_layer_name
from batchnorm.lab.report.figures.controls import Control, Slider
from batchnorm.lab.report.figures.downloads import Data
from batchnorm.lab.report.figures.evidence import Evidence
from batchnorm.lab.report.figures.figure import (
    LABELS,
    PHRASES,
    Axis,
    Figure,
    FigureTable,
    Plot,
    Series,
    Value,
    listed,
    shown,
)

__all__ = ["layers"]

BINS = 40
QUARTERS = (0, 25, 50, 75, 100)

Quantiles = Sequence[Value]


def _known(quantiles: Quantiles) -> list[float] | None:
    """Return the quantiles if all are finite; a diverged run has some that are not."""
    known = [value for value in quantiles if value is not None and np.isfinite(value)]
    return known if len(known) == len(quantiles) else None


def _edges(by_probe: Sequence[Quantiles]) -> list[float] | None:
    """Return bins that cover all but the outermost parts of the distribution at every step."""
    known = [quantiles for quantiles in map(_known, by_probe) if quantiles]
    if not known:
        return None
    low, high = min(quantiles[1] for quantiles in known), max(quantiles[-2] for quantiles in known)
    margin = 0.05 * (high - low) or 0.5
    return [float(edge) for edge in np.linspace(low - margin, high + margin, BINS + 1)]


def density(quantiles: Sequence[float], edges: Sequence[float]) -> list[float]:
    """Return the density in each bin of a distribution given by quantiles equally spaced from 0 to 1.

    >>> density([0.0, 1.0, 2.0], [0.0, 0.5, 1.0, 2.0])
    [0.5, 0.5, 0.5]
    """
    shares = np.linspace(0, 1, len(quantiles))
    below = np.interp(edges, quantiles, shares, left=0, right=1)
    return [float(height) for height in np.diff(below) / np.diff(edges)]


def _series(arm: str, layer: int, by_probe: Sequence[Quantiles]) -> list[Series]:
    """Return the density at every probe, in front of that of the first."""
    edges = _edges(by_probe)
    if edges is None:
        return []
    middles = [(low + high) / 2 for low, high in itertools.pairwise(edges)]
    drawn: list[Series] = []
    for i, quantiles in enumerate(by_probe):
        known = _known(quantiles)
        if known is None:
            continue
        heights = [float(f"{height:.3g}") for height in density(known, edges)]
        if not drawn:
            drawn.append(Series(arm, middles, heights, choice={"layer": str(layer)}, faint=True))
        choice = {"layer": str(layer), "step": str(i)}
        drawn.append(Series(arm, middles, heights, [0.0] * BINS, heights, choice=choice))
    return drawn


def _span(quantiles: Quantiles) -> float | None:
    """Return the width of the middle half."""
    known = _known(quantiles)
    return None if known is None else known[(len(known) - 1) * 3 // 4] - known[(len(known) - 1) // 4]


def _change(begin: float | None, end: float | None) -> str:
    """Return the change of a width in words."""
    return "out of bounds" if begin is None or end is None else f"from {number(begin)} to {number(end)}"


def layers(_: Evidence, details: ShiftDetails) -> Figure:
    """Return the distributions by layer and step, each arm in a plot."""
    probes, names = details.probes, details.distributions.layers
    arms = in_order_of_arms(details.distributions.quantiles)
    last = len(next(iter(arms.values()))[0][0]) - 1
    spans = []
    for arm, by_layer in arms.items():
        begin, end = (_span(by_layer[-1][i]) for i in (0, -1))
        spans.append(f"{_change(begin, end)} {PHRASES[arm]}")
    return Figure(
        key="layers",
        title="Inputs of the nonlinearity of each layer",
        finding=(
            f"From step {probes[0]} to step {probes[-1]} the width of the middle half of the inputs of "
            f"the nonlinearity of {names[-1]} changes {listed(spans)}."
        ),
        note=(
            "All units of a layer together, over the same training rows at every step, for the first seed. The pale "
            f"line is step {probes[0]}. The axes of a layer are the same at every step; the outermost "
            "2.5% on each side may lie beyond them."
        ),
        plots=[
            Plot(
                LABELS[arm].capitalize(),
                Axis("input of the nonlinearity", fixed_over=["step"]),
                Axis("density", fixed_over=["step"]),
                [series for k, by_probe in enumerate(by_layer) for series in _series(arm, k, by_probe)],
            )
            for arm, by_layer in arms.items()
        ],
        controls=[
            Control(
                "layer", "Hidden layer", [(str(k), short_layer_name(name)) for k, name in enumerate(names)], start=-1
            ),
            Slider("step", "Training", [(str(i), f"step {step}") for i, step in enumerate(probes)]),
        ],
        table=FigureTable(
            ["step", *(f"{names[-1]}, {LABELS[arm]}: least, quartiles, greatest" for arm in arms)],
            [
                [
                    str(step),
                    *(
                        ", ".join(shown(by_layer[-1][i][last * q // 100]) for q in QUARTERS)
                        for by_layer in arms.values()
                    ),
                ]
                for i, step in enumerate(probes)
            ],
        ),
        data=Data(
            "quantiles of the inputs of the nonlinearity of every layer",
            ["arm", "layer", "step", *(f"quantile {q / last:g}" for q in range(last + 1))],
            [
                [arm, names[k], probes[i], *quantiles]
                for arm, by_layer in arms.items()
                for k, by_probe in enumerate(by_layer)
                for i, quantiles in enumerate(by_probe)
            ],
        ),
    )
