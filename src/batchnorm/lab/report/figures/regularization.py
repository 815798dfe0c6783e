"""Figure of the gap between training and test score, and of the noise of a mini-batch's statistics."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from batchnorm.lab.claims.regularization import Noise, RegularizationDetails
from batchnorm.lab.comparison.measures import QuartileBand
from batchnorm.lab.report.figures.bands import band, band_rows, band_text, in_order_of_arms, is_known
from batchnorm.lab.report.figures.downloads import Cell, Data
from batchnorm.lab.report.figures.evidence import Evidence
from batchnorm.lab.report.figures.figure import (
    LABELS,
    PHRASES,
    Axis,
    Figure,
    FigureTable,
    Plot,
    ReferenceLine,
    Series,
    listed,
    shown,
)
from batchnorm.lab.training.settings import ARMS, Arm

__all__ = ["regularization"]

Statistic = Literal["mean", "sd"]
STATISTICS: dict[Statistic, str] = {"mean": "Noise of a mini-batch's mean", "sd": "Noise of its standard deviation"}


def _gap(evidence: Evidence, losses: list[float], gaps: Mapping[Arm, QuartileBand]) -> Plot:
    """Return the training score less the test score against the training loss, the lower losses to the right."""
    return Plot(
        f"Training less test {evidence.score_name}",
        Axis(f"training loss ({evidence.loss_name})", "log", range=(losses[0] * 1.05, losses[-1] / 1.05)),
        Axis(""),
        [band(arm, losses, values) for arm, values in gaps.items()],
        [ReferenceLine("y", 0.0, "no gap")],
    )


def _by_arm(noise: Noise, statistic: Statistic) -> dict[Arm, list[float]]:
    return in_order_of_arms(noise.mean if statistic == "mean" else noise.sd)


def _noise(evidence: Evidence, statistic: Statistic, noise: Noise) -> Plot:
    """Return the noise of a statistic against the batch size."""
    sizes = noise.batch_sizes
    series = [Series("theory", sizes, noise.theory)] if statistic == "mean" else []
    series += [
        Series(arm, sizes, values, marks=["known"] * len(sizes)) for arm, values in _by_arm(noise, statistic).items()
    ]
    here = evidence.settings.batch_size
    return Plot(
        STATISTICS[statistic],
        Axis(
            "rows in a mini-batch",
            "log",
            ticks=[(size, str(size)) for size in sizes],
            range=(sizes[0] / 1.2, sizes[-1] * 1.2),
        ),
        Axis("", "log"),
        series,
        [ReferenceLine("x", here, "this run")] if sizes[0] <= here <= sizes[-1] else [],
    )


def _finding(losses: list[float], gaps: Mapping[Arm, QuartileBand], score: str) -> str:
    """Return the gap at the least training loss that all arms reach, in words."""
    known = [i for i in range(len(losses)) if all(is_known(values.median[i]) for values in gaps.values())]
    if not known:
        return "There is no training loss that most runs of every arm reach."
    at = known[-1]
    parts = [f"{values.median[at]:.3f} {PHRASES[arm]}" for arm, values in gaps.items()]
    return (
        f"At a training loss of {losses[at]:.2g}, the least that most runs of every arm reach, the training {score} "
        f"is above the test {score} by {listed(parts)}."
    )


def regularization(evidence: Evidence, details: RegularizationDetails) -> Figure | None:
    """Return the gap against the training loss and the noise against the batch size; None where both are missing."""
    losses, gaps = details.losses, in_order_of_arms(details.gaps)
    noise = details.noise
    sizes = noise.batch_sizes
    if not gaps and not sizes:
        return None
    plots = [_gap(evidence, losses, gaps)] if gaps else []
    plots += [_noise(evidence, statistic, noise) for statistic in STATISTICS] if sizes else []
    rows = [
        [f"gap at a training loss of {shown(loss)}", *(band_text(values, i) for values in gaps.values())]
        for i, loss in enumerate(losses)
    ]
    data: list[list[Cell]] = [*band_rows(["gap by training loss"], losses, gaps)]
    for statistic, title in STATISTICS.items() if sizes else ():
        arms = _by_arm(noise, statistic)
        rows += [
            [f"{title.lower()}, {size} rows", *(shown(arms[arm][i]) if arm in arms else "-" for arm in ARMS)]
            for i, size in enumerate(sizes)
        ]
        data += [
            [f"{title.lower()} by batch size", arm, size, values[i], None, None]
            for arm, values in arms.items()
            for i, size in enumerate(sizes)
        ]
    noisy = (
        " The noise is that of the inputs of the last hidden nonlinearity at the end of training, over "
        "mini-batches drawn from the training rows, in standard deviations of all rows. The thin line is 1 over the "
        "root of the number of rows in a mini-batch."
    )
    return Figure(
        key="regularization",
        title="The gap at equal training loss, and the noise that may narrow it",
        finding=_finding(losses, gaps, evidence.score_name) if gaps else "No gap could be measured.",
        note=(
            "The gap: median and middle half over the seeds, where more than half of them reach that training loss."
            + (noisy if sizes else "")
        ),
        plots=plots,
        table=FigureTable(["quantity", *LABELS.values()], rows),
        data=Data("gap and noise", ["quantity", "arm", "at", "value", "low", "high"], data),
    )
