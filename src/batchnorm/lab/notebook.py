"""The comparison and the study from Python: arrays or a data frame in, an object with tables and figures out."""

from __future__ import annotations

import math
import shutil
import tempfile
import weakref
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, fields
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from joblib import cpu_count

from batchnorm.errors import DataError, InputError
from batchnorm.lab.claims import CLAIMS, ClaimTests, Judgment, read_judgment
from batchnorm.lab.comparison.conduct import compare as run_comparison
from batchnorm.lab.comparison.conduct import fit_to_data
from batchnorm.lab.comparison.request import Request
from batchnorm.lab.comparison.result import Result
from batchnorm.lab.comparison.run_file import RunFile, new_folder
from batchnorm.lab.data.dataset import Task, prepare
from batchnorm.lab.data.tables import Table
from batchnorm.lab.files import write_file
from batchnorm.lab.report import terminal
from batchnorm.lab.report.figures import Figure
from batchnorm.lab.report.report import figure_html, report_data, report_html
from batchnorm.lab.training.settings import Arm, Settings

__all__ = ["Comparison", "ShownFigure", "compare", "study"]

UNKNOWN = (None, None)


@dataclass(frozen=True)
class ShownFigure:
    """A figure of the report: in a notebook it draws itself."""

    figure: Figure
    seconds_a_step: Mapping[Arm, float] | None

    @property
    def title(self) -> str:
        """What it shows."""
        return self.figure.title

    @property
    def finding(self) -> str:
        """What is seen in it, in one sentence."""
        return self.figure.finding

    def table(self) -> pl.DataFrame:
        """Its numbers, as the table under it in the report has them."""
        columns = self.figure.table.columns
        return pl.DataFrame([list(row) for row in self.figure.table.rows], schema=list(columns), orient="row")

    def to_html(self) -> str:
        """An HTML page of the figure alone, which works offline."""
        return figure_html(self.figure, self.seconds_a_step)

    def _repr_html_(self) -> str:
        page = escape(self.to_html(), quote=True)
        return (
            f'<iframe title="{escape(self.title)}" style="width:100%;height:42rem;border:0" srcdoc="{page}"></iframe>'
        )


class Comparison:
    """What a comparison found; in a notebook it shows its verdict and its tables.

    Attributes
    ----------
    result : Result
        All numbers of the comparison (docs/compare.md names them).
    judgment : Judgment or None
        The judged claims, where some were measured.
    folder : Path
        Where run.json is; a temporary folder that goes with this object unless ``out`` named one.
    """

    def __init__(self, run: RunFile) -> None:
        self._run = run
        self.folder = run.folder
        assert run.result is not None
        self.result: Result = run.result
        self.judgment: Judgment | None = read_judgment(run)
        self._report = report_data(run)

    @property
    def verdict(self) -> str:
        """The verdict in one sentence."""
        return str(self.result.verdict)

    @property
    def figures(self) -> dict[str, ShownFigure]:
        """The figures of the report by their names, in its order."""
        return {figure.key: ShownFigure(figure, self._report.seconds_a_step) for figure in self._report.figures}

    def table(self) -> pl.DataFrame:
        """A row for each arm; times fewer are bounds of the median and of its interval, null steps are above S."""
        rows = []
        for arm, values in self.result.arms.items():
            ratio = self.result.ratios.get(arm)
            difference = ratio.test_difference if ratio else None
            claimed = ratio if self.result.headline else None
            median, interval = (claimed.median, claimed.interval) if claimed else (UNKNOWN, UNKNOWN)
            seconds = claimed.seconds.median if claimed and claimed.seconds else UNKNOWN
            low, high = difference.interval if difference else UNKNOWN
            rows.append(
                {
                    "batch_norm": arm,
                    "learning_rate": values.learning_rate,
                    "median_steps": values.median_steps,
                    "times_fewer_steps_at_least": median[0],
                    "times_fewer_steps_at_most": median[1],
                    "interval_low": interval[0],
                    "interval_high": interval[1],
                    "times_fewer_seconds_at_least": seconds[0],
                    "times_fewer_seconds_at_most": seconds[1],
                    "milliseconds_a_step": 1000 * (values.seconds_per_step or math.nan),
                    "rates_that_reach": values.rates_that_reach,
                    "test_score": values.test_score,
                    "test_difference": difference.estimate if difference else None,
                    "test_difference_low": low,
                    "test_difference_high": high,
                }
            )
        return pl.DataFrame(rows, infer_schema_length=None)

    def verdicts(self) -> pl.DataFrame:
        """A row for each thing claimed, with its verdict and its p-value, alone and corrected; none without claims."""
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
        texts = ("claim", "label", "subject", "verdict", "amount", "reason")
        names = ("claim", "label", "subject", "verdict", "amount", "p", "corrected_p", "reason")
        return pl.DataFrame(rows, schema={name: pl.String if name in texts else pl.Float64 for name in names})

    def to_html(self, path: str | Path | None = None) -> str:
        """The report, an HTML page that works offline; written to ``path``, whole or not at all, where one is given."""
        page = report_html(self._run)
        if path is not None:
            write_file(Path(path), page)
        return page

    def __repr__(self) -> str:
        return f"Comparison({self._report.name}): {self.verdict}"

    def _repr_html_(self) -> str:
        tables = [self.table(), *([self.verdicts()] if self.judgment else [])]
        shown = "".join(_html(table) for table in tables)
        return f"<p><strong>{escape(self.verdict)}</strong></p><p>{escape(str(self.result.caveat))}</p>{shown}"


def _html(table: pl.DataFrame) -> str:
    """A data frame as an HTML table."""

    def cell(value: Any) -> str:
        return "" if value is None else f"{value:.3g}" if isinstance(value, float) else escape(str(value))

    head = "".join(f'<th scope="col">{name.replace("_", " ")}</th>' for name in table.columns)
    rows = "".join(f"<tr>{''.join(f'<td>{cell(value)}</td>' for value in row)}</tr>" for row in table.iter_rows())
    return f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"


def _frame(x: Any) -> pl.DataFrame:
    """The features as a Polars data frame; columns of an array are x1, x2, ..."""
    if isinstance(x, pl.DataFrame):
        return x
    if hasattr(x, "columns"):  # pandas, and what behaves like it
        return pl.DataFrame([pl.Series(str(name), np.asarray(x[name]).tolist(), strict=False) for name in x.columns])
    array = np.asarray(x)
    if array.ndim != 2:
        raise DataError(f"X must have 2 dimensions, rows and columns; got {array.ndim}")
    return pl.DataFrame([pl.Series(f"x{i}", column.tolist(), strict=False) for i, column in enumerate(array.T, 1)])


def _table(x: Any, y: Any, name: str) -> Table:
    """Features and target as one table."""
    frame = _frame(x)
    if isinstance(y, str):
        if y not in frame.columns:
            raise DataError(f"y must be a column of X, or one value a row; X has no column {y!r}")
        return Table(name, frame, y)
    values = np.asarray(y)
    if values.ndim != 1:
        raise DataError(f"y must have 1 dimension; got {values.ndim}")
    if len(values) != frame.height:
        raise DataError(f"y must have one value for each of the {frame.height} rows of X; got {len(values)}")
    target = str(getattr(y, "name", None) or "y")
    if target in frame.columns:
        raise DataError(f"y must not be named as a column of X is; both are named {target!r}")
    return Table(name, frame.with_columns(pl.Series(target, values.tolist(), strict=False)), target)


def compare(
    X: Any,
    y: Any,
    *,
    name: str = "data",
    task: Task | None = None,
    numeric: Sequence[str] = (),
    categorical: Sequence[str] = (),
    claims: Sequence[str] = (),
    jobs: int | None = None,
    out: str | Path | None = None,
    progress: bool = False,
    **settings: Any,
) -> Comparison:
    """Train a network without batch norm, with it before and with it after the nonlinearity, and compare.

    The same as the command ``batchnorm compare``; docs/compare.md says how it is done.

    Parameters
    ----------
    X : array or data frame, shape (rows, columns)
        Features: numbers, texts, booleans or dates; missing ones are filled in.
    y : array, shape (rows,), or str
        What to predict, or the name of the column of X that holds it.
    name : str
        What the report calls the data.
    task : "classification" or "regression", optional
        Otherwise inferred: text, and whole numbers of at most 20 values, are classes.
    numeric, categorical : sequences of column names
        Columns to take as numbers or as categories, whatever they look like.
    claims : sequence of str
        Claims to measure too: "fewer_steps", "stability", "initial_weights", "regularization", "inputs",
        "placement", "shift".
    jobs : int, optional
        Processes of one thread; by default one a core.
    out : path, optional
        A new or empty folder to keep run.json in; by default a temporary one.
    progress : bool
        Show bars on stderr.
    **settings
        Fields of `Settings`: hidden, activation, batch_size, optimizer, learning_rates,
        search_seeds, seeds, steps, init, init_scale, inputs, target_score, seed.

    Returns
    -------
    Comparison
        With ``verdict``, ``table()``, ``verdicts()``, ``figures`` and ``to_html()``.

    Raises
    ------
    DataError
        The data can't be used; the message says which rule it breaks.
    InputError
        A setting or claim that there is not, or a value that it can't have.
    RunError
        The folder can't be written to.

    Examples
    --------
    >>> import batchnorm as bn
    >>> from sklearn.datasets import load_wine
    >>> found = bn.lab.compare(*load_wine(return_X_y=True), hidden=(8,), steps=30, seeds=2, search_seeds=1, jobs=1)
    >>> found.table()["batch_norm"].to_list()
    ['none', 'before', 'after']
    """
    known = {field.name for field in fields(Settings)}
    unknown = [setting for setting in settings if setting not in known]
    if unknown:
        raise InputError(f"a setting must be one of {', '.join(sorted(known))}; got {unknown[0]!r}")
    tests = ClaimTests(claims) if claims else None
    names = tests.names if tests else []
    given = Settings(**settings)
    dataset = prepare(_table(X, y, name), task=task, numeric=numeric, categorical=categorical, seed=given.seed)
    fitted, _ = fit_to_data(given, dataset)
    run = RunFile.create(
        Path(tempfile.mkdtemp(prefix="batchnorm-")) if out is None else new_folder(Path(out), name),
        dataset.describe(),
        fitted,
        request=Request(claims=names),
        command=_call(settings, names),
    )
    if out is None:
        weakref.finalize(run, shutil.rmtree, run.folder, ignore_errors=True)
    shown = terminal.Bars() if progress else terminal.Silence()
    with shown if isinstance(shown, terminal.Bars) else nullcontext():
        run_comparison(dataset, run, jobs=jobs or cpu_count(), progress=shown, extension=tests)
    return Comparison(run)


def _call(settings: dict[str, Any], claims: list[str]) -> str:
    """The call as it would be typed."""
    function = "study" if claims == list(CLAIMS) else "compare"
    given = settings | ({"claims": claims} if claims and function == "compare" else {})
    return f"bn.lab.{function}({', '.join(['X', 'y', *(f'{name}={value!r}' for name, value in given.items())])})"


def study(X: Any, y: Any, **options: Any) -> Comparison:
    """`compare`, and every claim made for batch normalization measured too; takes the options of `compare`.

    Examples
    --------
    ``bn.lab.study(X, y).verdicts()`` is a data frame with a row for each thing claimed.
    """
    if "claims" in options:
        raise InputError(f"study measures every claim; got claims={options['claims']!r}: compare takes some of them")
    return compare(X, y, claims=list(CLAIMS), **options)
