"""How far each layer's inputs move in a step, and beside it how far the gradient can be trusted."""

from __future__ import annotations

import math
from typing import Any

from batchnorm.lab.comparison.verdict import number
from batchnorm.lab.report.figures.bands import band, band_rows, of_arms, short, spread_text, step_axis
from batchnorm.lab.report.figures.controls import Control
from batchnorm.lab.report.figures.downloads import Data
from batchnorm.lab.report.figures.evidence import Evidence
from batchnorm.lab.report.figures.figure import LABELS, PHRASES, Axis, Figure, Plot, Table, listed

__all__ = ["drift"]


def _correlation(details: dict[str, Any]) -> str:
    """How the steps needed go with the drift and with the change of the gradient, over all runs."""
    parts = []
    for name, what in (("drift", "drift"), ("gradient", "change of the gradient")):
        found = details.get("correlation", {}).get(name) or {"rho": None}
        if found["rho"] is not None:
            parts.append(f"{found['rho']:+.2f} with their {what}")
            runs = found["runs"]
    return f" Over all {runs} runs the steps needed have a rank correlation of {listed(parts)}." if parts else ""


def _middle(values: list[float | None]) -> str:
    known = sorted(value for value in values if value is not None)
    return number(known[len(known) // 2]) if known and math.isfinite(known[len(known) // 2]) else "not finite"


def drift(_: Evidence, details: dict[str, Any]) -> Figure | None:
    """Drift of a layer's inputs and relative change of the gradient over training; None where neither was recorded."""
    if "drift" not in details:
        return None
    probes, layers = details["probes"], details["layers"]
    drifts, changes = of_arms(details["drift"]), of_arms(details["gradient"])
    x = step_axis(probes)
    moved = [f"{_middle(values[-1]['median'])} {PHRASES[arm]}" for arm, values in drifts.items()]
    return Figure(
        key="drift",
        title="Drift of a layer's inputs, and the smoothness of the loss",
        finding=f"The median drift of the inputs of the {layers[-1]} is {listed(moved)}." + _correlation(details),
        note=(
            "Drift: the symmetrised Kullback-Leibler divergence, in nats, between the distributions of the layer's "
            "inputs before and after one step. Change of the gradient: its length over that of the gradient, after one "
            "learning rate along it; the less, the smoother the loss. Every arm at the learning rate "
            f"{details['learning_rate']:g}; median and middle half over the seeds."
        ),
        plots=[
            Plot(
                "Drift of its inputs in a step",
                x,
                Axis("", "log"),
                [
                    band(arm, probes, by_layer[i], choice={"layer": str(i)})
                    for arm, by_layer in drifts.items()
                    for i in range(len(layers))
                ],
            ),
            Plot(
                "Change of the gradient in a step",
                x,
                Axis("", "log"),
                [band(arm, probes, values) for arm, values in changes.items()],
            ),
        ],
        controls=[Control("layer", "Drift into", [(str(i), short(layer)) for i, layer in enumerate(layers)], start=-1)],
        table=Table(
            [
                "step",
                *(f"drift into the {layers[-1]}, {LABELS[arm]}" for arm in drifts),
                *(f"change of the gradient, {LABELS[arm]}" for arm in changes),
            ],
            [
                [
                    str(step),
                    *(spread_text(values[-1], i) for values in drifts.values()),
                    *(spread_text(values, i) for values in changes.values()),
                ]
                for i, step in enumerate(probes)
            ],
        ),
        data=Data(
            "drift of every layer, and change of the gradient",
            ["what", "arm", "step", "median", "low", "high"],
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
