"""From a table to the numbers a network is trained, validated and tested on."""

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
from batchnorm.lab.data.tables import Table

__all__ = ["Dataset", "Task", "prepare", "running_index", "split"]

Task = Literal["classification", "regression"]

MOST_CLASSES_IN_NUMBERS = 20
MOST_CATEGORIES = 20
MOST_VALIDATION_ROWS = 5000
LARGEST_DEVIATION = 1e30
FEWEST_ROWS = 10


@dataclass(frozen=True)
class Dataset:
    """Features and targets of the three parts of one split.

    ``x`` are the features before scaling, missing values filled in; ``centre`` and ``scale``, taken from the
    training rows, standardise them (0 and 1 for the one-hot columns of a category). ``y`` are class numbers, or
    the target standardised on the training rows. ``parts`` holds the row numbers of "train", "validation" and
    "test". All is float64 until a part is standardised; ``dtype`` is what a network gets.
    """

    name: str
    task: Task
    target: str
    x: NDArray[np.float64]
    y: NDArray[Any]
    parts: dict[str, NDArray[np.int64]]
    centre: NDArray[np.float64]
    scale: NDArray[np.float64]
    features: list[str]
    classes: list[str]
    left_out: list[dict[str, str]]
    notes: list[str] = field(default_factory=list)
    dtype: type[np.floating[Any]] = np.float32

    @property
    def outputs(self) -> int:
        """Numbers that a network must put out: one a class, or one."""
        return len(self.classes) if self.task == "classification" else 1

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the features and targets, by which a resumed run knows its data again."""
        return hashlib.sha256(np.ascontiguousarray(self.x).tobytes() + self.y.tobytes()).hexdigest()

    @property
    def constant_loss(self) -> float:
        """Validation loss of one guess for every row: the classes' shares, or the mean, of the training rows."""
        train, validation = self.y[self.parts["train"]], self.y[self.parts["validation"]]
        if self.task == "regression":
            return float(np.mean((validation - train.mean()) ** 2))
        shares = np.bincount(train, minlength=len(self.classes)) / len(train)
        return float(np.mean(-np.log(shares[validation])))

    def part(self, name: str, *, standardized: bool) -> tuple[NDArray[np.floating[Any]], NDArray[Any]]:
        """Features and targets of a part, standardised or as they are, in the dtype of the training."""
        rows = self.parts[name]
        x = self.x[rows]
        return ((x - self.centre) / self.scale if standardized else x).astype(self.dtype), self.y[rows]

    def describe(self) -> dict[str, Any]:
        """What a report says of the data."""
        return {
            "name": self.name,
            "task": self.task,
            "target": self.target,
            "rows": {part: len(rows) for part, rows in self.parts.items()},
            "features": self.features,
            "classes": self.classes,
            "left_out": self.left_out,
            "notes": self.notes,
            "sha256": self.fingerprint,
        }


def split(rows: int, classes: NDArray[np.int64] | None, seed: int) -> dict[str, NDArray[np.int64]]:
    """Split row numbers 60/20/20 at random, each class in proportion.

    Rows are shuffled, put in order of their class, and dealt train, validation, train, test, train, ...; so any
    two rows of a class, however rare, include one to train on.
    """
    order = np.random.default_rng(seed).permutation(rows)
    if classes is not None:
        order = order[np.argsort(classes[order], kind="stable")]
    turn = np.arange(rows) % 5
    parts = {"train": order[turn % 2 == 0], "validation": order[turn == 1], "test": order[turn == 3]}
    return {name: np.sort(chosen) for name, chosen in parts.items()}


def running_index(values: pl.Series) -> bool:
    """Whether whole numbers go up by 1 from row to row, as an index does."""
    if not values.dtype.is_integer() or values.null_count() or values.len() < 2:
        return False
    return bool((values.diff().drop_nulls() == 1).all())


def _reason_to_leave_out(column: pl.Series, categorical: bool) -> str | None:
    known = column.drop_nulls()
    if known.len() == 0:
        return "it has no values"
    if known.n_unique() == 1:
        return "it has one value" if known.len() == column.len() else None
    if categorical and known.n_unique() == column.len():
        return _reason_texts_differ(known)
    if not categorical and running_index(column):
        return "it counts the rows, as an index does"
    return None


def _reason_texts_differ(texts: pl.Series) -> str:
    """Whether texts that all differ look like identifiers, or like numbers with a few that are none among them."""
    odd = texts.filter(texts.cast(pl.String).str.strip_chars().cast(pl.Float64, strict=False).is_null())
    if 2 * odd.len() >= texts.len():
        return "all its texts differ, as identifiers do"
    return f"its texts differ and are not all numbers, such as {odd[0]!r}"


def _as_numbers(column: pl.Series) -> pl.Series:
    if column.dtype.is_temporal():
        column = column.to_physical()
    try:
        numbers = column.cast(pl.Float64)
    except pl.exceptions.InvalidOperationError as error:
        text = next(v for v in column.drop_nulls() if _not_a_number(v))
        raise DataError(f"column {column.name!r} must hold numbers; it holds {text!r}") from error
    return numbers.to_frame().select(pl.when(pl.all().is_finite()).then(pl.all())).to_series()


def _not_a_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return True
    return False


def _target(column: pl.Series, task: Task | None) -> tuple[Task, NDArray[Any], list[str], str]:
    """Task, targets, class names, and the sentence that says why this task."""
    if not _plain(column):
        raise DataError(f"a target must hold numbers, texts or dates; {column.name!r} holds {column.dtype}")
    numeric = column.dtype.is_numeric()
    whole = numeric and bool((column == column.cast(pl.Float64).round()).all())
    few = column.n_unique() <= MOST_CLASSES_IN_NUMBERS
    chosen: Task = task or ("classification" if not numeric or (whole and few) else "regression")
    if chosen == "regression":
        y = _as_numbers(column)
        if y.null_count():
            raise DataError(f"a regression target must be finite; {column.name!r} is not in {y.null_count()} rows")
        why = "as asked" if task else f"{column.name} is a number with {column.n_unique()} values"
        return chosen, y.to_numpy(), [], f"regression: {why}"
    counts = column.value_counts().sort(column.name)
    if counts.height < 2:
        raise DataError(f"a target must have at least 2 classes; {column.name!r} has 1: {counts[0, 0]}")
    rare = counts.filter(pl.col("count") < 2)
    if rare.height:
        raise DataError(
            f"every class must have at least 2 rows; in {column.name!r} {rare[0, 0]} has 1"
            + (f", and so have {rare.height - 1} others" if rare.height > 1 else "")
        )
    values = counts[column.name]
    names = [str(value) for value in values]
    y = column.replace_strict(values, pl.Series(range(len(names))), return_dtype=pl.Int64)
    why = "as asked" if task else f"{column.name} has {len(names)} {'values' if numeric else 'categories'}"
    return chosen, y.to_numpy(), names, f"classification: {why}"


def _one_hot(column: pl.Series, train: NDArray[np.int64]) -> tuple[list[str], NDArray[np.float64], str | None]:
    """One column a category of the training rows, the rarest together; a missing value is a category too."""
    texts = column.cast(pl.String).fill_null("(missing)")
    ranked = texts[train].value_counts(sort=True).sort("count", texts.name, descending=[True, False])[texts.name]
    kept = ranked.head(MOST_CATEGORIES).sort().to_list()
    names = [f"{column.name}={category}" for category in kept]
    columns = [(texts == category).to_numpy() for category in kept]
    note = None
    if ranked.len() > len(kept):
        names.append(f"{column.name}=(other)")
        columns.append((~texts.is_in(kept)).to_numpy())
        note = f"{column.name}: the {len(kept)} most frequent of {ranked.len()} categories are told apart"
    return names, np.stack(columns, axis=1).astype(np.float64), note


def _plain(column: pl.Series) -> bool:
    """Whether a column holds numbers, texts, categories, booleans or dates, and no lists or objects."""
    return not (column.dtype.is_nested() or column.dtype in (pl.Object, pl.Binary))


def _is_categorical(column: pl.Series) -> bool:
    return not (column.dtype.is_numeric() or column.dtype.is_temporal())


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
        Columns to take as numbers or as categories, whatever they look like.
    seed : int
        Of the split.

    Raises
    ------
    DataError
        The table can't be used: the message says which rule it breaks.
    """
    for name in [*numeric, *categorical]:
        if name not in table.frame.columns or name == table.target:
            raise DataError(f"--numeric and --categorical must name columns other than the target; got {name!r}")
    frame = table.frame.with_columns(cs.boolean().cast(pl.String))
    notes: list[str] = []
    known = frame.drop_nulls(table.target)
    if known.schema[table.target].is_float():
        known = known.filter(pl.col(table.target).is_finite())
    if known.height == 0:
        raise DataError(f"the target must have values; all of {table.target!r} are missing")
    if known.height < frame.height:
        notes.append(f"{frame.height - known.height} rows without a value of {table.target} are not used")
    if known.height < FEWEST_ROWS:
        raise DataError(f"DATA must have at least {FEWEST_ROWS} rows with a target; got {known.height}")
    chosen, y, classes, why = _target(known[table.target], task)
    notes.insert(0, why)
    parts = split(known.height, y if classes else None, seed)

    left_out: list[dict[str, str]] = []
    numbers: dict[str, NDArray[np.float64]] = {}
    categories: list[tuple[list[str], NDArray[np.float64]]] = []
    filled = 0
    for column in known.drop(table.target).iter_columns():
        if not _plain(column):
            left_out.append({"column": column.name, "reason": f"it holds {column.dtype}"})
            continue
        forced = column.name in numeric or column.name in categorical
        as_category = column.name in categorical or (_is_categorical(column) and column.name not in numeric)
        values = column if as_category else _as_numbers(column) if column.dtype.is_float() or forced else column
        reason = _reason_to_leave_out(values, as_category)
        if reason is None or (forced and values.null_count() < values.len()):
            if as_category:
                names, encoded, note = _one_hot(column, parts["train"])
                categories.append((names, encoded))
                notes += [note] if note else []
            else:
                values = _as_numbers(values)
                filled += values.null_count()
                middle = values[parts["train"]].median()
                numbers[column.name] = values.fill_null(0.0 if middle is None else middle).to_numpy()
        else:
            left_out.append({"column": column.name, "reason": reason})
    if not numbers and not categories:
        reasons = "; ".join(f"{out['column']}: {out['reason']}" for out in left_out)
        raise DataError(f"DATA must have a usable column besides the target; got none{reasons and f' ({reasons})'}")
    if filled:
        notes.append(f"{filled} missing numbers are filled with the median of their column in the training rows")
    kept = parts["validation"]
    if len(kept) > MOST_VALIDATION_ROWS:
        chosen_rows = np.random.default_rng(seed).permutation(len(kept))[:MOST_VALIDATION_ROWS]
        parts["validation"] = kept[np.sort(chosen_rows)]
        notes.append(f"{MOST_VALIDATION_ROWS} of {len(kept)} validation rows are used")

    plain = np.stack(list(numbers.values()), axis=1) if numbers else np.empty((known.height, 0))
    train = parts["train"]
    with np.errstate(over="ignore", invalid="ignore"):
        deviation = plain[train].std(axis=0)
    for name, width in zip(numbers, deviation, strict=True):
        if not width < LARGEST_DEVIATION:
            raise DataError(f"numbers must fit a float32; the standard deviation of column {name!r} is {width:.3g}")
    varies = np.ptp(plain[train], axis=0) > 0  # not the deviation, which of one value need not round to 0
    ones = sum(len(names) for names, _ in categories)
    if chosen == "regression":
        spread = y[train].std()
        if np.ptp(y[train]) == 0:
            raise DataError(f"a regression target must vary; {table.target!r} has one value in the training rows")
        y = ((y - y[train].mean()) / spread).astype(np.float32)
    return Dataset(
        name=table.name,
        task=chosen,
        target=table.target,
        x=np.concatenate([plain, *(encoded for _, encoded in categories)], axis=1),
        y=y,
        parts=parts,
        centre=np.concatenate([plain[train].mean(axis=0), np.zeros(ones)]),
        scale=np.concatenate([np.where(varies, deviation, 1.0), np.ones(ones)]),
        features=[*numbers, *(name for names, _ in categories for name in names)],
        classes=classes,
        left_out=left_out,
        notes=notes,
    )
