"""Names of columns: tidy, never empty, each once, and found despite a slip of the pen."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from difflib import get_close_matches

from batchnorm.errors import DataError

__all__ = ["check_columns", "first_names", "suggestion", "unique_names", "unknown_column"]

SHOWN = 30


def unique_names(names: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return a name of its own for each column, and notes on those that were changed.

    >>> unique_names(["value", "y", "value", ""])[0]
    ['value (column 1)', 'y', 'value (column 3)', 'column_4']
    """
    given = [" ".join(name.split()) for name in names]
    repeated = {name: count for name, count in Counter(filter(None, given)).items() if count > 1}
    taken = {name for name in given if name not in repeated}
    unique = list(given)
    for i, name in enumerate(given):
        if not name or name in repeated:
            number = i + 1
            while (made := f"{name} (column {number})" if name else f"column_{number}") in taken:
                number += 1
            taken.add(made)
            unique[i] = made
    notes = []
    for name, count in list(repeated.items())[:SHOWN]:
        new = [changed for changed, old in zip(unique, given, strict=True) if old == name]
        notes.append(f"{count} columns have the name {name!r}; they are called {' and '.join(map(repr, new[:5]))}")
    return unique, notes


def first_names(names: Sequence[str]) -> str:
    """Return the first names, as a message lists them."""
    return ", ".join(names[:SHOWN]) + (", ..." if len(names) > SHOWN else "")


def suggestion(name: str, names: Sequence[str]) -> str:
    """Return the question whether another name was meant, or an empty text.

    >>> suggestion("survived", ["Survived", "Age"])
    "; did you mean 'Survived'?"
    """
    by_fold = {other.casefold(): other for other in reversed(names)}
    folded = name.strip().casefold()
    close = [folded] if folded in by_fold else get_close_matches(folded, by_fold, n=1, cutoff=0.7)
    close = close or [other for other in by_fold if other.startswith(f"{folded} (column ")]
    return f"; did you mean {by_fold[close[0]]!r}?" if close else ""


def check_columns(numeric: Sequence[str], categorical: Sequence[str], names: Sequence[str]) -> None:
    """Raise `DataError` if an option names a column that the data lacks."""
    for rule, columns in (("numeric", numeric), ("categorical", categorical)):
        for column in columns:
            if column not in names:
                raise unknown_column(f"{rule} must name columns of the data", column, names)


def unknown_column(rule: str, name: str, names: Sequence[str]) -> DataError:
    """Return the error about a name that no column has."""
    return DataError(f"{rule}; got {name!r}, the columns are {first_names(names)}{suggestion(name, names)}")
