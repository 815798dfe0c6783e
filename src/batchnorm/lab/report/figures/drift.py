"""Figure of the drift of each layer's inputs per step, beside the change of the gradient."""

from __future__ import annotations

import math

from batchnorm.lab.claims.shift import Correlations, ShiftDetails
from batchnorm.lab.comparison.verdict import number
from batchnorm.lab.report.figures.bands import (
    band,
    band_rows,
    band_text,
    in_order_of_arms,
    is_known,
    short_layer_name,
    step_axis,
)
from batchnorm.lab.report.figures.controls import Control
from batchnorm.lab.report.figures.downloads import Data
from batchnorm.lab.report.figures.evidence import Evidence
from batchnorm.lab.report.figures.figure import LABELS, PHRASES, Axis, Figure, FigureTable, Plot, listed

__all__ = ["drift"]


def _correlation(correlations: Correlations) -> str:
    """Return the rank correlation of the steps needed with the drift and with the change of the gradient."""
    parts = []
    for correlation, amount in ((correlations.drift, "drift"), (correlations.gradient, "change of the gradient")):
        if correlation.rho is not None:
            parts.append(f"{correlation.rho:+.2f} with their {amount}")
            runs = correlation.runs
    return f" Over all {runs} runs the steps needed have a rank correlation of {listed(parts)}." if parts else ""


def _middle(values: list[float]) -> str:
    """Return the median of the known values, as text."""
    known = sorted(value for value in values if is_known(value))
    return number(known[len(known) // 2]) if known and math.isfinite(known[len(known) // 2]) else "not finite"


def drift(_: Evidence, details: ShiftDetails) -> Figure:
    """Return the drift of a layer's inputs and the relative change of the gradient over training."""
    probes, layers = details.probes, details.layers
    drifts, changes = in_order_of_arms(details.drift), in_order_of_arms(details.gradient)
    x = step_axis(probes)
    drifted = [f"{_middle(values[-1].median)} {PHRASES[arm]}" for arm, values in drifts.items()]
    return Figure(
        key="drift",
        title="Drift of a layer's inputs, and the smoothness of the loss",
        finding=f"The median drift of the inputs of the {layers[-1]} is {listed(drifted)}."
        + _correlation(details.correlation),
        note=(
            "Drift: the symmetrized Kullback-Leibler divergence, in nats, between the distributions of the layer's "
            "inputs before and after one step. Change of the gradient: its length over that of the gradient, after one "
            "learning rate along it; a smaller change means a smoother loss. Every arm at the learning rate "
            f"{details.learning_rate:g}; median and middle half over the seeds."
        ),
        plots=[
            Plot(
                "Drift of its inputs per step",
                x,
                Axis("", "log"),
                [
                    band(arm, probes, by_layer[i], choice={"layer": str(i)})
                    for arm, by_layer in drifts.items()
                    for i in range(len(layers))
                ],
            ),
            Plot(
                "Change of the gradient per step",
                x,
                Axis("", "log"),
                [band(arm, probes, values) for arm, values in changes.items()],
            ),
        ],
        controls=[
            Control(
                "layer", "Drift into", [(str(i), short_layer_name(layer)) for i, layer in enumerate(layers)], start=-1
            )
        ],
        table=FigureTable(
            [
                "step",
                *(f"drift into the {layers[-1]}, {LABELS[arm]}" for arm in drifts),
                *(f"change of the gradient, {LABELS[arm]}" for arm in changes),
            ],
            [
                [
                    str(step),
                    *(band_text(values[-1], i) for values in drifts.values()),
                    *(band_text(values, i) for values in changes.values()),
                ]
                for i, step in enumerate(probes)
            ],
        ),
        data=Data(
            "drift of every layer, and change of the gradient",
            ["quantity", "arm", "step", "median", "low", "high"],
            [
                *(
                    row
                    for k, layer in enumerate(layers)
                    for row in band_rows(
                        [f"drift of the inputs of the {layer}"], probes, {a: v[k] for a, v in drifts.items()}
                    )
                ),
                *band_rows(["change of the gradient"], probes, changes),
            ],
        ),
    )
