"""The gap between training and test score at equal training loss, and the noise of a mini-batch's statistics."""

from __future__ import annotations

from typing import Any

from batchnorm.lab.report.figures.bands import band, band_rows, of_arms, spread_text
from batchnorm.lab.report.figures.downloads import Cell, Data
from batchnorm.lab.report.figures.evidence import Evidence
from batchnorm.lab.report.figures.figure import LABELS, PHRASES, Axis, Figure, Plot, Rule, Series, Table, listed, shown

__all__ = ["regularization"]

STATISTICS = {"mean": "Noise of a mini-batch's mean", "sd": "Noise of its standard deviation"}


def _gap(evidence: Evidence, losses: list[float], gaps: dict[str, Any]) -> Plot:
    """Training score less test score against the training loss, the lower losses to the right."""
    return Plot(
        f"Training less test {evidence.score_name}",
        Axis(f"training loss ({evidence.loss_name})", "log", range=(losses[0] * 1.05, losses[-1] / 1.05)),
        Axis(""),
        [band(arm, losses, values) for arm, values in gaps.items()],
        [Rule("y", 0.0, "no gap")],
    )


def _noise(evidence: Evidence, name: str, noise: dict[str, Any]) -> Plot:
    """Noise of a statistic against the batch size."""
    sizes = noise["batch_sizes"]
    series = [Series("theory", sizes, noise["theory"])] if name == "mean" else []
    series += [Series(arm, sizes, values, marks=["known"] * len(sizes)) for arm, values in of_arms(noise[name]).items()]
    here = evidence.settings.batch_size
    return Plot(
        STATISTICS[name],
        Axis(
            "rows in a mini-batch",
            "log",
            ticks=[(size, str(size)) for size in sizes],
            range=(sizes[0] / 1.2, sizes[-1] * 1.2),
        ),
        Axis("", "log"),
        series,
        [Rule("x", here, "this run")] if sizes[0] <= here <= sizes[-1] else [],
    )


def _finding(losses: list[float], gaps: dict[str, Any], score: str) -> str:
    """The gap at the least training loss that all arms reach."""
    known = [i for i in range(len(losses)) if all(values["median"][i] is not None for values in gaps.values())]
    if not known:
        return "There is no training loss that most runs of every arm reach."
    at = known[-1]
    parts = [f"{values['median'][at]:.3f} {PHRASES[arm]}" for arm, values in gaps.items()]
    return (
        f"At a training loss of {losses[at]:.2g}, the least that most runs of every arm reach, the training {score} "
        f"is above the test {score} by {listed(parts)}."
    )


def regularization(evidence: Evidence, details: dict[str, Any]) -> Figure | None:
    """Gap against training loss, and noise against batch size."""
    losses, gaps = details.get("losses", []), of_arms(details.get("gaps", {}))
    noise = details.get("noise") or {"batch_sizes": []}
    sizes = noise["batch_sizes"]
    if not gaps and not sizes:
        return None
    plots = [_gap(evidence, losses, gaps)] if gaps else []
    plots += [_noise(evidence, name, noise) for name in STATISTICS] if sizes else []
    rows = [
        [f"gap at a training loss of {shown(loss)}", *(spread_text(values, i) for values in gaps.values())]
        for i, loss in enumerate(losses)
    ]
    data: list[list[Cell]] = [*band_rows(["gap by training loss"], losses, gaps)]
    for name, title in STATISTICS.items() if sizes else ():
        arms = of_arms(noise[name])
        rows += [
            [f"{title.lower()}, {size} rows", *(shown(arms[arm][i]) if arm in arms else "-" for arm in LABELS)]
            for i, size in enumerate(sizes)
        ]
        data += [
            [f"{title.lower()} by batch size", arm, size, values[i], None, None]
            for arm, values in arms.items()
            for i, size in enumerate(sizes)
        ]
    noisy = (
        " The noise is that of what enters the last hidden nonlinearity at the end of training, over "
        "mini-batches drawn from the training rows, in standard deviations of all rows; the thin line is 1 over the "
        "root of the rows in a mini-batch."
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
        table=Table(["what", *LABELS.values()], rows),
        data=Data("gap and noise", ["what", "arm", "at", "value", "low", "high"], data),
    )
