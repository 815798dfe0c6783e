"""A trained model given new data: has it shifted, and what adapting and retraining would do about it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray
from sklearn.base import clone
from sklearn.metrics import accuracy_score
from sklearn.model_selection import train_test_split

from batchnorm.errors import DataError, InputError
from batchnorm.lab.data.tables import read_frame, target_of
from batchnorm.lab.serving.served import Served
from batchnorm.statistics import Shift, adapt, detect_shift

__all__ = ["Rows", "Scores", "ShiftReport", "examine", "read_rows"]

BATCH = 256


@dataclass(frozen=True)
class Rows:
    """Features (N, features), and what is to be predicted (N,) where it is known."""

    features: NDArray[np.float64]
    target: NDArray[Any] | None


@dataclass(frozen=True)
class Scores:
    """Accuracy, or an estimator's own score, on rows that neither remedy has seen.

    Attributes
    ----------
    as_is, adapted : float
        Of the model as it is, and with statistics adapted to the other rows, without their labels.
    retrained : float or None
        Of the estimator fitted anew to the other rows; a Module's training is not known.
    rows, others : int
        That are scored, and that the remedies were given.
    prior : float
        Of the adaptation.
    """

    as_is: float
    adapted: float
    retrained: float | None
    rows: int
    others: int
    prior: float


@dataclass(frozen=True)
class ShiftReport:
    """What `examine` found; ``str()`` of it is the page that the command line prints."""

    shift: Shift
    scores: Scores | None

    def __str__(self) -> str:
        if self.scores is None:
            return str(self.shift)
        found = self.scores
        lines = ["", f"score on {found.rows:,} rows:", f"  as is      {found.as_is:.3f}"]
        lines.append(
            f"  adapted    {found.adapted:.3f}  to {found.others:,} other rows, prior {found.prior:g}, no labels"
        )
        if found.retrained is not None:
            lines.append(f"  retrained  {found.retrained:.3f}  on these other rows, with their labels")
        return "\n".join([str(self.shift), *lines])

    def to_json(self) -> str:
        """All figures, in full precision."""
        shift = self.shift.to_dict()
        scores = None if self.scores is None else asdict(self.scores)
        return json.dumps({"shift": shift, "scores": scores}, indent=2, allow_nan=False)


def read_rows(data: str, target: str | None, columns: Sequence[str]) -> Rows:
    """Read the rows of a table as a model takes them: columns of numbers without empty cells.

    Parameters
    ----------
    data : str
        A built-in data set or a file.
    target : str or None
        The column to predict; none of the features.
    columns : sequence of str
        The features in the model's order; none takes all other columns.

    Raises
    ------
    DataError
        No such table or column; a feature that is no number, or an empty cell.
    """
    _, frame = read_frame(data)
    found = target_of(frame, data, target)
    for name in columns:
        if name not in frame.columns:
            raise DataError(f"columns must be columns of the data; got {name!r}, of {len(frame.columns)} others")
    names = list(columns) or [name for name in frame.columns if name != found]
    for name in names:
        column = frame[name]
        if not (column.dtype.is_numeric() or column.dtype == pl.Boolean):
            raise DataError(
                f"a feature must be a column of numbers; {name!r} is {column.dtype}: choose others with columns="
            )
        if column.null_count():
            raise DataError(f"a feature must have no empty cell; {name!r} has {column.null_count()}")
    if found is not None and frame[found].null_count():
        raise DataError(f"the target must have no empty cell; {found!r} has {frame[found].null_count()}")
    features = frame.select(pl.col(name).cast(pl.Float64) for name in names).to_numpy()
    return Rows(features, None if found is None else frame[found].to_numpy())


def examine(
    served: Served, rows: Rows, reference: Rows | None = None, *, prior: float, alpha: float, reference_samples: int
) -> ShiftReport:
    """Test the rows for a shift and, where their target is known, score the model, adapted and retrained beside it.

    Half of the rows, drawn with a fixed seed, are for the remedies and half for the score.

    Raises
    ------
    InputError
        The model does not take such rows, or has no output that could be scored.
    """
    _check_takes(served, rows.features[:2])
    shift = detect_shift(
        served.model,
        _batches(served, rows.features),
        reference=None if reference is None else _batches(served, reference.features),
        alpha=alpha,
        reference_samples=reference_samples,
    )
    if rows.target is None:
        return ShiftReport(shift, None)
    given, kept = train_test_split(np.arange(len(rows.target)), test_size=0.5, random_state=0)
    x, y = rows.features[kept], rows.target[kept]
    as_is = _score(served, x, y)
    with adapt(served.model, _batches(served, rows.features[given]), prior=prior):
        adapted = _score(served, x, y)
    retrained = None
    if served.estimator is not None:
        retrained = float(clone(served.estimator).fit(rows.features[given], rows.target[given]).score(x, y))
    return ShiftReport(shift, Scores(as_is, adapted, retrained, len(kept), len(given), prior))


def _check_takes(served: Served, rows: NDArray[np.float64]) -> None:
    try:
        with torch.no_grad():
            served.model(served.to_input(rows))
    except Exception as error:  # of torch or of a pipeline's step, whatever they raise
        said = f"{type(error).__name__}: {error}".splitlines()[0]
        raise InputError(f"the model must take rows of {rows.shape[1]} features; it raises {said}") from error


def _batches(served: Served, features: NDArray[np.float64]) -> list[torch.Tensor]:
    return list(torch.split(served.to_input(features), BATCH))


def _score(served: Served, features: NDArray[np.float64], target: NDArray[Any]) -> float:
    if served.estimator is not None:
        return float(served.estimator.score(features, target))
    with torch.no_grad():
        output = torch.cat([served.model(batch) for batch in _batches(served, features)])
    if output.dim() != 2 or output.shape[1] < 2:
        raise InputError(
            f"a score needs a model with one output per class, (N, classes); got {tuple(output.shape)}. Without a "
            "target no score is computed"
        )
    return float(accuracy_score(target, output.argmax(1).numpy()))
