"""Test for a shift of the data that a trained model is given, and the effect of adapting and retraining it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray
from sklearn.base import clone
from sklearn.metrics import accuracy_score
from sklearn.model_selection import train_test_split

from batchnorm.errors import DataError, InputError
from batchnorm.lab.data.findings import describe_cells
from batchnorm.lab.data.frames import ReadFrame
from batchnorm.lab.data.names import unknown_column
from batchnorm.lab.data.reading import Reading
from batchnorm.lab.data.stray_targets import check_target
from batchnorm.lab.data.tables import AS_IT_STANDS, read_frame, target_of
from batchnorm.lab.serving.served import Served
from batchnorm.reports import Block, Entries, Report
from batchnorm.statistics import Shift, adapt, detect_shift
from batchnorm.statistics.batches import BatchReader

__all__ = ["Scores", "ShiftReport", "TableRows", "examine", "read_rows"]

BATCH_SIZE = 256


@dataclass(frozen=True)
class TableRows:
    """Rows of a table, as a model takes them.

    Attributes
    ----------
    features : ndarray, shape (N, features)
    target : ndarray, shape (N,), or None
        The values to predict, where they are known.
    notes : sequence of str
        Sentences about how the table was read.
    """

    features: NDArray[np.float64]
    target: NDArray[Any] | None
    notes: Sequence[str] = ()


@dataclass(frozen=True)
class Scores:
    """Accuracy, or the estimator's own score, on rows that neither remedy has seen.

    Attributes
    ----------
    as_is : float
        Score of the model as it is.
    adapted : float
        Score with statistics adapted to the other rows, without their labels.
    retrained : float or None
        Score of the estimator refitted on the other rows; None for a Module, whose training is unknown.
    rows, others : int
        Number of scored rows, and of rows that the remedies were given.
    prior : float
        Number of samples that the stored statistics count as in the adaptation.
    """

    as_is: float
    adapted: float
    retrained: float | None
    rows: int
    others: int
    prior: float


@dataclass(frozen=True, repr=False)
class ShiftReport(Report):
    """The result of `examine`: the test for a shift, the scores where the target is known, and notes on the rows."""

    shift: Shift
    scores: Scores | None
    notes: Sequence[str] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return the test and the scores as values that JSON has."""
        return super().to_dict() | {"shift": self.shift.to_dict()}

    def to_json(self) -> str:
        """Return the test and the scores as JSON, in full precision."""
        return json.dumps(self.to_dict(), indent=2, allow_nan=False)

    def _blocks(self) -> Iterable[Block]:
        yield from self.shift._blocks()
        if self.scores is not None:
            yield from self._score_blocks(self.scores)
        if self.notes:
            yield ""
            yield "On the data:"
            yield from (f"- {note}" for note in self.notes)

    def _score_blocks(self, found: Scores) -> Iterable[Block]:
        entries = [
            ("as is", f"{found.as_is:.3f}"),
            ("adapted", f"{found.adapted:.3f}  to {found.others:,} other rows without labels, prior {found.prior:g}"),
        ]
        if found.retrained is not None:
            entries.append(("retrained", f"{found.retrained:.3f}  on the same other rows, with labels"))
        yield ""
        yield f"Score on {found.rows:,} rows:"
        yield Entries(entries)

    def _summary(self) -> str:
        scored = "" if self.scores is None else f", score {self.scores.as_is:.3f}, adapted {self.scores.adapted:.3f}"
        noted = f", {len(self.notes)} note{'s' if len(self.notes) > 1 else ''}" if self.notes else ""
        return f"{self.shift._summary()}{scored}{noted}"

    def _records(self) -> list[dict[str, Any]]:
        return self.shift._records()


def read_rows(data: str, target: str | None, columns: Sequence[str], reading: Reading = AS_IT_STANDS) -> TableRows:
    """Read the rows of a table as a model takes them: columns of numbers without empty cells.

    Parameters
    ----------
    data : str
        A built-in data set or a file.
    target : str or None
        The column to predict, which is no feature.
    columns : sequence of str
        The features in the model's order; if empty, all columns but the target.
    reading : Reading
        Decisions that the table itself leaves open.

    Raises
    ------
    DataError
        There is no such table or column, a feature is not a number, or a cell is empty.
    """
    _, read = read_frame(data, reading)
    frame = read.frame
    found = target_of(frame, data, target)
    for name in columns:
        if name not in frame.columns:
            raise unknown_column("columns must be columns of the data", name, frame.columns)
    names = list(columns) or [name for name in frame.columns if name != found]
    for name in names:
        column = frame[name]
        if not (column.dtype.is_numeric() or column.dtype == pl.Boolean):
            raise DataError(
                f"a feature must be a column of numbers; {name!r} is {column.dtype}: pass columns=NAMES for others"
                f"{_example(read, column)}"
            )
        _check_filled("a feature", read, column)
    if found is not None:
        check_target(frame[found], read.findings, read.places, None, may_keep=False)
        _check_filled("the target", read, frame[found])
    features = frame.select(pl.col(name).cast(pl.Float64) for name in names).to_numpy()
    return TableRows(features, None if found is None else frame[found].to_numpy(), read.notes)


def _example(read: ReadFrame, column: pl.Series) -> str:
    """Return the cells of a column that are no numbers, where the others are, with their places."""
    mixed = next((f for f in read.findings if f.column == column.name and f.rule == "mixed"), None)
    return "" if mixed is None else f", or correct {describe_cells(mixed.cells)}"


def _check_filled(what: str, read: ReadFrame, column: pl.Series) -> None:
    if not column.null_count():
        return
    first = int(column.is_null().arg_true()[0])
    taken = [f for f in read.findings if f.column == column.name and f.rule in ("missing", "unreadable")]
    reason = f" ({taken[0].note})" if taken else ""
    raise DataError(
        f"{what} must have no empty cell; {column.name!r} has {column.null_count()}, the first in "
        f"{read.places.name(first)}{reason}: fill them in, or leave out their rows"
    )


def examine(
    served: Served,
    rows: TableRows,
    reference: TableRows | None = None,
    *,
    prior: float,
    alpha: float,
    reference_samples: int,
    say: Callable[[str], None] = lambda _: None,
) -> ShiftReport:
    """Test rows for a shift and, where their target is known, score the model as it is, adapted and retrained.

    The remedies are given half of the rows, drawn with a fixed seed, and the scores are computed on the other half.

    Parameters
    ----------
    served : Served
    rows : TableRows
    reference : TableRows or None
        Rows without a shift; None compares with the stored statistics.
    prior, alpha, reference_samples
        As for `adapt` and `detect_shift`.
    say : function of str
        Called with the name of each part of the work before it begins.

    Raises
    ------
    InputError
        The model does not take such rows, or its output can't be scored.
    """
    _check_takes(served, rows.features[:2])
    say("testing for a shift")
    shift = detect_shift(
        served.model,
        _batches(served, rows.features),
        reference=None if reference is None else _batches(served, reference.features),
        alpha=alpha,
        reference_samples=reference_samples,
    )
    if rows.target is None:
        return ShiftReport(shift, None, _notes(rows, reference))
    given, scored = train_test_split(np.arange(len(rows.target)), test_size=0.5, random_state=0)
    x, y = rows.features[scored], rows.target[scored]
    say("adapting")
    as_is = _score(served, x, y)
    with adapt(served.model, _batches(served, rows.features[given]), prior=prior):
        adapted = _score(served, x, y)
    retrained = None
    if served.estimator is not None:
        say("retraining")
        retrained = float(clone(served.estimator).fit(rows.features[given], rows.target[given]).score(x, y))
    scores = Scores(as_is, adapted, retrained, len(scored), len(given), prior)
    return ShiftReport(shift, scores, _notes(rows, reference))


def _notes(rows: TableRows, reference: TableRows | None) -> list[str]:
    return [*rows.notes, *(f"reference: {note}" for note in (reference.notes if reference else ()))]


def _check_takes(served: Served, rows: NDArray[np.float64]) -> None:
    try:
        with torch.no_grad():
            BatchReader(served.model).run(served.to_input(rows))
    except Exception as error:  # torch and the steps of a pipeline can raise anything
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise InputError(f"the model must take rows of {rows.shape[1]} features; it raises {reason}") from error


def _batches(served: Served, features: NDArray[np.float64]) -> list[torch.Tensor]:
    return list(torch.split(served.to_input(features), BATCH_SIZE))


def _score(served: Served, features: NDArray[np.float64], target: NDArray[Any]) -> float:
    if served.estimator is not None:
        return float(served.estimator.score(features, target))
    with torch.no_grad():
        reader = BatchReader(served.model)
        output = torch.cat([reader.run(batch).cpu() for batch in _batches(served, features)])
    if output.dim() != 2 or output.shape[1] < 2:
        raise InputError(
            f"a score needs a model with one output per class, (N, classes); got {tuple(output.shape)}. Without a "
            "target no score is computed"
        )
    return float(accuracy_score(target, output.argmax(1).numpy()))
