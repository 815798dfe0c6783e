"""The result of `bn.lab.compare`: its tables, its figures and its report."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import polars as pl

from batchnorm.lab.claims import Judgment, read_judgment
from batchnorm.lab.comparison.result import Result
from batchnorm.lab.comparison.run_file import RunFile
from batchnorm.lab.comparison.verdict import bounds_text
from batchnorm.lab.files import write_file
from batchnorm.lab.report.figures import Figure
from batchnorm.lab.report.report import figure_html, report_data, report_html
from batchnorm.lab.report.summary import summarize
from batchnorm.lab.training.settings import Arm
from batchnorm.reports import Block, Report

__all__ = ["Comparison", "ShownFigure"]

UNKNOWN = (None, None)
VERDICT_COLUMNS: dict[str, type[pl.DataType]] = {
    "claim": pl.String,
    "label": pl.String,
    "subject": pl.String,
    "verdict": pl.String,
    "amount": pl.String,
    "p": pl.Float64,
    "corrected_p": pl.Float64,
    "reason": pl.String,
}


@dataclass(frozen=True)
class ShownFigure:
    """A figure of the report, which a notebook draws.

    Attributes
    ----------
    figure : Figure
    seconds_per_step : dict of arm to float, or None
        Seconds per gradient step, with which the figure can show seconds in place of steps.
    """

    figure: Figure
    seconds_per_step: Mapping[Arm, float] | None

    @property
    def title(self) -> str:
        """The title of the figure."""
        return self.figure.title

    @property
    def finding(self) -> str:
        """The finding of the figure in one sentence."""
        return self.figure.finding

    def frame(self) -> pl.DataFrame:
        """Return the numbers of the figure as a Polars frame, as the table below it in the report shows them."""
        columns = self.figure.table.columns
        return pl.DataFrame([list(row) for row in self.figure.table.rows], schema=list(columns), orient="row")

    def to_html(self) -> str:
        """Return the figure as an HTML page, which works offline."""
        return figure_html(self.figure, self.seconds_per_step)

    def _repr_html_(self) -> str:
        page = escape(self.to_html(), quote=True)
        return (
            f'<iframe title="{escape(self.title)}" style="width:100%;height:42rem;border:0" srcdoc="{page}"></iframe>'
        )


@dataclass(frozen=True, repr=False)
class Comparison(Report):
    """Report of a comparison: ``print(report)`` shows its verdict and its tables.

    Attributes
    ----------
    result : Result
        All numbers of the comparison (docs/compare.md lists them).
    judgment : Judgment or None
        The judged claims, where some were measured.
    folder : Path
        Folder of run.json; a temporary folder that is deleted with this object, unless ``out`` named one.
    """

    result: Result
    judgment: Judgment | None
    folder: Path
    _run: RunFile

    @classmethod
    def of(cls, run: RunFile) -> Comparison:
        """Return the report of a complete run."""
        assert run.result is not None
        return cls(run.result, read_judgment(run), run.folder, run)

    @property
    def verdict(self) -> str:
        """The verdict in one sentence."""
        return str(self.result.verdict)

    @property
    def figures(self) -> dict[str, ShownFigure]:
        """The figures of the report by name, in its order."""
        report = report_data(self._run)
        return {figure.key: ShownFigure(figure, report.seconds_per_step) for figure in report.figures}

    def to_dict(self) -> dict[str, Any]:
        """Return ``result`` of run.json: JSON-ready, with infinities as "inf"."""
        return self._run.result_json or {}

    def verdicts(self) -> pl.DataFrame:
        """Return a Polars frame with a row per finding of each claim; without claims it is empty."""
        rows = [
            {
                "claim": claim.name,
                "label": finding.label,
                "subject": finding.subject,
                "verdict": finding.verdict,
                "amount": finding.text,
                "p": finding.p_holds,
                "corrected_p": finding.adjusted_holds,
                "reason": finding.reason,
            }
            for claim in (self.judgment.claims if self.judgment else [])
            for finding in claim.findings
        ]
        return pl.DataFrame(rows, schema=VERDICT_COLUMNS)

    def to_html(self, path: str | Path | None = None) -> str:
        """Return the report as an HTML page, which works offline, and write it to ``path`` if one is given."""
        page = report_html(self._run)
        if path is not None:
            write_file(Path(path), page)
        return page

    def _blocks(self) -> Iterable[Block]:
        return summarize(self.result, self.judgment)

    def _summary(self) -> str:
        ratios = [f"{arm} {bounds_text(ratio.median)}" for arm, ratio in self.result.ratios.items()]
        claimed = f"ratio of steps {', '.join(ratios)}" if self.result.headline else "no ratio of steps claimed"
        notes = len(self.result.notes)
        return f"{self._run.data.name!r}, {claimed}, {notes} note{'s' if notes != 1 else ''}"

    def _records(self) -> list[dict[str, Any]]:
        records = []
        for arm, values in self.result.arms.items():
            ratio = self.result.ratios.get(arm)
            difference = ratio.test_difference if ratio else None
            claimed = ratio if self.result.headline else None
            median, interval = (claimed.median, claimed.interval) if claimed else (UNKNOWN, UNKNOWN)
            seconds = claimed.seconds.median if claimed and claimed.seconds else UNKNOWN
            low, high = difference.interval if difference else UNKNOWN
            per_step = values.seconds_per_step
            records.append(
                {
                    "batch_norm": arm,
                    "learning_rate": values.learning_rate,
                    "median_steps": values.median_steps,
                    "step_ratio_at_least": median[0],
                    "step_ratio_at_most": median[1],
                    "step_ratio_low": interval[0],
                    "step_ratio_high": interval[1],
                    "second_ratio_at_least": seconds[0],
                    "second_ratio_at_most": seconds[1],
                    "milliseconds_per_step": None if per_step is None else 1000 * per_step,
                    "rates_that_reach": values.rates_that_reach,
                    "test_score": values.test_score,
                    "test_difference": difference.estimate if difference else None,
                    "test_difference_low": low,
                    "test_difference_high": high,
                }
            )
        return records
