"""The protocol of all reports: a table, a short repr, plain values, a data frame and HTML."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from html import escape
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from batchnorm.errors import MissingDependencyError
from batchnorm.text import format_entries, format_table, wrap

if TYPE_CHECKING:
    import polars as pl

__all__ = ["Block", "Entries", "Report", "Table", "json_safe"]


class Table(NamedTuple):
    """A part of a report: columns of text under their headings."""

    header: Sequence[str]
    columns: Sequence[Sequence[str]]
    indent: str = ""

    def lines(self) -> list[str]:
        """Return the table as plain text."""
        return format_table(self.header, self.columns, indent=self.indent)

    def html(self) -> str:
        """Return the table as HTML."""
        head = "".join(f"<th>{escape(cell)}</th>" for cell in self.header)
        rows = ["".join(f"<td>{escape(cell)}</td>" for cell in row) for row in zip(*self.columns, strict=True)]
        return f"<table><thead><tr>{head}</tr></thead><tbody>{_rows(rows)}</tbody></table>"


class Entries(NamedTuple):
    """A part of a report: labels, each with a text beside it."""

    entries: Sequence[tuple[str, str]]

    def lines(self) -> list[str]:
        """Return the entries as plain text."""
        return format_entries(self.entries)

    def html(self) -> str:
        """Return the entries as HTML."""
        rows = [f"<th>{escape(label)}</th><td>{escape(text)}</td>" for label, text in self.entries]
        return f"<table><tbody>{_rows(rows)}</tbody></table>"


Block = str | Table | Entries
"""A part of a report; a string is a paragraph, and an empty one a blank line."""


class Report(ABC):
    """Base class of the results that public functions return.

    ``str()`` is a table of at most 80 columns, ``repr()`` one short line, and notebooks show an HTML table. A subclass
    is a frozen dataclass with ``repr=False``. It says what the report shows, in `_blocks`, and what its data are, in
    `_records`; fields whose name begins with an underscore are private.
    """

    @abstractmethod
    def _blocks(self) -> Iterable[Block]:
        """Return the parts of the report, in the order in which they are shown."""

    @abstractmethod
    def _summary(self) -> str:
        """Return the text that `repr` shows between the parentheses."""

    @abstractmethod
    def _records(self) -> list[dict[str, Any]]:
        """Return the rows of `frame`, each a mapping from column to value."""

    def __str__(self) -> str:
        return "\n".join(line for block in self._blocks() for line in _lines(block))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._summary()})"

    def _repr_html_(self) -> str:
        parts = (f"<p>{escape(block)}</p>" if isinstance(block, str) else block.html() for block in self._blocks())
        return f"<div>{''.join(part for part in parts if part != '<p></p>')}</div>"

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as values that JSON has; NaN and infinities become None."""
        return {name: json_safe(value) for name, value in _public_fields(self).items()}

    def frame(self) -> pl.DataFrame:
        """Return the report as a Polars frame, with a row per layer or item.

        Raises
        ------
        MissingDependencyError
            Polars is not installed.
        """
        try:
            import polars as pl
        except ImportError as error:
            raise MissingDependencyError("frame() needs polars: pip install 'batchnorm[lab]'") from error
        return pl.DataFrame(self._records(), infer_schema_length=None)


def json_safe(value: Any) -> Any:
    """Return a value with dataclasses, arrays and tensors as dicts and lists, and numbers that JSON lacks as None.

    >>> json_safe({"mean": torch.tensor([1.0, float("nan")]), "shape": (2, 3)})
    {'mean': [1.0, None], 'shape': [2, 3]}
    """
    if isinstance(value, torch.Tensor):
        return json_safe(value.detach().tolist())
    if isinstance(value, np.ndarray | np.generic):
        return json_safe(value.tolist())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if is_dataclass(value) and not isinstance(value, type):
        return {name: json_safe(field) for name, field in _public_fields(value).items()}
    if isinstance(value, Mapping):
        return {str(key): json_safe(item) for key, item in value.items()}
    if isinstance(value, str | int | None):
        return value
    if isinstance(value, Iterable):
        return [json_safe(item) for item in value]
    return str(value)


def _public_fields(value: Any) -> dict[str, Any]:
    return {field.name: getattr(value, field.name) for field in fields(value) if not field.name.startswith("_")}


def _lines(block: Block) -> list[str]:
    return wrap(block) if isinstance(block, str) else block.lines()


def _rows(rows: Iterable[str]) -> str:
    return "".join(f"<tr>{row}</tr>" for row in rows)
