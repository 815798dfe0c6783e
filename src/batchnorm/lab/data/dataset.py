"""Data sets: the numbers that a network is trained, validated and tested on, made from a table."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import polars as pl
from numpy.typing import NDArray
from polars import selectors as cs

from batchnorm.errors import DataError
from batchnorm.lab.data.columns import LeftOut
from batchnorm.lab.data.features import Features, encode_columns
from batchnorm.lab.data.names import suggestion
from batchnorm.lab.data.stray_targets import check_target
from batchnorm.lab.data.tables import Table
from batchnorm.lab.data.target import Target, Task, encode_target

__all__ = ["DataDescription", "Dataset", "PartName", "Task", "prepare", "split"]

PartName = Literal["train", "validation", "test"]

MAX_VALIDATION_ROWS = 5000
MAX_DEVIATION = 1e30
MIN_ROWS = 10


@dataclass(frozen=True)
class DataDescription:
    """Description of a data set, as a report shows it.

    Attributes
    ----------
    name, task, target : str
    rows : dict of str to int
        Number of rows of each part.
    features, classes : list of str
    left_out : list of LeftOut
        Columns that are not used.
    notes : list of str
        Sentences about decisions that were taken.
    sha256 : str
        Fingerprint of features and targets.
    """

    name: str
    task: Task
    target: str
    rows: dict[PartName, int]
    features: list[str]
    classes: list[str]
    left_out: list[LeftOut]
    notes: list[str]
    sha256: str

    @property
    def sentences(self) -> list[str]:
        """The notes, and a sentence per column that is left out."""
        return [*self.notes, *(f"column {left.column} is left out: {left.reason}" for left in self.left_out)]


@dataclass(frozen=True)
class Dataset:
    """Features and targets of the three parts of one split.

    Attributes
    ----------
    name, task, target : str
    x : ndarray, shape (N, features)
        Features before scaling, with missing values filled in.
    y : ndarray, shape (N,)
        Class numbers, or the target standardized on the training rows.
    parts : dict of str to ndarray
        Row numbers of "train", "validation" and "test".
    center, scale : ndarray, shape (features,)
        Mean and standard deviation of the training rows; 0 and 1 for the one-hot columns of a category.
    features, classes : list of str
    left_out : list of LeftOut
    notes : list of str
    dtype : type
        The dtype of a network's inputs; everything else is float64.
    """

    name: str
    task: Task
    target: str
    x: NDArray[np.float64]
    y: NDArray[Any]
    parts: dict[PartName, NDArray[np.int64]]
    center: NDArray[np.float64]
    scale: NDArray[np.float64]
    features: list[str]
    classes: list[str]
    left_out: list[LeftOut]
    notes: list[str] = field(default_factory=list)
    dtype: type[np.floating[Any]] = np.float32

    @property
    def outputs(self) -> int:
        """Number of outputs that a network needs: one per class, or one."""
        return len(self.classes) if self.task == "classification" else 1

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the features and targets, by which a resumed run recognizes its data."""
        return hashlib.sha256(np.ascontiguousarray(self.x).tobytes() + self.y.tobytes()).hexdigest()

    @property
    def constant_loss(self) -> float:
        """Validation loss of one guess for every row: the class shares, or the mean, of the training rows."""
        train, validation = self.y[self.parts["train"]], self.y[self.parts["validation"]]
        if self.task == "regression":
            return float(np.mean((validation - train.mean()) ** 2))
        shares = np.bincount(train, minlength=len(self.classes)) / len(train)
        return float(np.mean(-np.log(shares[validation])))

    def part(self, name: PartName, *, standardized: bool) -> tuple[NDArray[np.floating[Any]], NDArray[Any]]:
        """Return features and targets of a part, standardized or as they are, in the dtype of the network."""
        rows = self.parts[name]
        x = self.x[rows]
        return ((x - self.center) / self.scale if standardized else x).astype(self.dtype), self.y[rows]

    def describe(self, further_note: str | None = None) -> DataDescription:
        """Return the description that a report shows, with one more note where one is given."""
        return DataDescription(
            name=self.name,
            task=self.task,
            target=self.target,
            rows={part: len(rows) for part, rows in self.parts.items()},
            features=self.features,
            classes=self.classes,
            left_out=self.left_out,
            notes=[*self.notes, *filter(None, [further_note])],
            sha256=self.fingerprint,
        )


def split(rows: int, classes: NDArray[np.int64] | None, seed: int) -> dict[PartName, NDArray[np.int64]]:
    """Split row numbers 60/20/20 at random, each class in proportion.

    Rows are shuffled, put in order of their class, and dealt train, validation, train, test, train, and so on: at least
    one of any two rows of a class, however rare, is a training row.
    """
    order = np.random.default_rng(seed).permutation(rows)
    if classes is not None:
        order = order[np.argsort(classes[order], kind="stable")]
    turn = np.arange(rows) % 5
    return {
        "train": np.sort(order[turn % 2 == 0]),
        "validation": np.sort(order[turn == 1]),
        "test": np.sort(order[turn == 3]),
    }


def prepare(
    table: Table,
    *,
    task: Task | None = None,
    numeric: Sequence[str] = (),
    categorical: Sequence[str] = (),
    seed: int = 0,
) -> Dataset:
    """Turn a table into a `Dataset`: choose columns, fill in missing values, encode categories, split.

    Parameters
    ----------
    table : Table
        The rows.
    task : "classification" or "regression", optional
        Otherwise inferred: text, and whole numbers of at most 20 values, are classes.
    numeric, categorical : sequences of column names
        Columns to take as numbers or as categories, regardless of their values. If ``categorical`` has the target, each
        of its texts is a class.
    seed : int
        Seed of the split.

    Raises
    ------
    DataError
        The table can't be used: the message says which rule it breaks.
    """
    for name, columns in (("numeric", numeric), ("categorical", categorical)):
        for column in columns:
            if column not in table.frame.columns or (column == table.target and name == "numeric"):
                close = suggestion(column, table.frame.columns)
                raise DataError(f"{name} must name columns other than the target; got {column!r}{close}")
    if table.target not in categorical:
        check_target(table.frame[table.target], table.findings, table.places, task)
    frame = table.frame.with_columns(cs.boolean().cast(pl.String))
    known = _rows_with_target(frame, table.target)
    target = encode_target(known[table.target], task)
    notes = [target.note, *table.notes]
    if known.height < frame.height:
        lost = frame.height - known.height
        rows = "1 row without a value of {} is" if lost == 1 else f"{lost} rows without a value of {{}} are"
        notes.append(f"{rows.format(table.target)} not used")
    parts = split(known.height, target.y if target.classes else None, seed)
    features = encode_columns(known.drop(table.target).iter_columns(), parts["train"], numeric, categorical)
    if not features.numbers and not features.categories:
        reasons = "; ".join(f"{out.column}: {out.reason}" for out in features.left_out)
        raise DataError(f"the data must have a usable column besides the target; got none{reasons and f' ({reasons})'}")
    notes += features.notes
    validation = parts["validation"]
    if len(validation) > MAX_VALIDATION_ROWS:
        chosen = np.random.default_rng(seed).permutation(len(validation))[:MAX_VALIDATION_ROWS]
        parts["validation"] = validation[np.sort(chosen)]
        notes.append(f"{MAX_VALIDATION_ROWS} of {len(validation)} validation rows are used")
    center, scale = _scaling(features, parts["train"])
    return Dataset(
        name=table.name,
        task=target.task,
        target=table.target,
        x=np.stack([*features.numbers.values(), *features.categories.values()], axis=1),
        y=_standardized(target, table.target, parts["train"]),
        parts=parts,
        center=center,
        scale=scale,
        features=[*features.numbers, *features.categories],
        classes=target.classes,
        left_out=features.left_out,
        notes=notes,
    )


def _rows_with_target(frame: pl.DataFrame, target: str) -> pl.DataFrame:
    known = frame.drop_nulls(target)
    if known.schema[target].is_float():
        known = known.filter(pl.col(target).is_finite())
    if known.height == 0:
        raise DataError(f"the target must have values; all of {target!r} are missing")
    if known.height < MIN_ROWS:
        raise DataError(f"the data must have at least {MIN_ROWS} rows with a target; got {known.height}")
    return known


def _scaling(features: Features, train: NDArray[np.int64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return center and scale of all features: those of the training rows for numbers, 0 and 1 for one-hot columns."""
    if features.numbers:
        numbers = np.stack(list(features.numbers.values()), axis=1)[train]
    else:
        numbers = np.empty((len(train), 0))
    with np.errstate(over="ignore", invalid="ignore"):
        deviation = numbers.std(axis=0)
    for name, size in zip(features.numbers, deviation, strict=True):
        if not size < MAX_DEVIATION:
            raise DataError(f"numbers must fit a float32; the standard deviation of column {name!r} is {size:.3g}")
    varies = np.ptp(numbers, axis=0) > 0  # the deviation of equal values need not round to 0
    one_hot = len(features.categories)
    return (
        np.concatenate([numbers.mean(axis=0), np.zeros(one_hot)]),
        np.concatenate([np.where(varies, deviation, 1.0), np.ones(one_hot)]),
    )


def _standardized(target: Target, name: str, train: NDArray[np.int64]) -> NDArray[Any]:
    """Return class numbers as they are, and numbers standardized on the training rows, in float32."""
    if target.task == "classification":
        return target.y
    known = target.y[train]
    if np.ptp(known) == 0:
        raise DataError(f"a regression target must vary; {name!r} has one value in the training rows")
    return ((target.y - known.mean()) / known.std()).astype(np.float32)  # type: ignore[no-any-return]
