"""Plain text for a terminal of 80 columns: number formats, tables and labeled entries."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterable, Sequence

__all__ = ["WIDTH", "format_column", "format_entries", "format_table", "shorten", "wrap"]

WIDTH = 80
SHORTEST = 12
"""The first column of a table is never shortened to fewer characters."""


def format_column(values: Sequence[float | None], digits: int = 5) -> list[str]:
    """Write numbers with the same number of decimals, so that they line up when aligned to the right.

    The largest number shows `digits` digits, and trailing zeros that all numbers share are dropped. A column whose
    largest number is below 0.01, or has more than ``digits + 1`` digits before the point, is written with exponents.
    None is left blank.

    >>> format_column([2.9, -0.9, None, 10 / 3])
    ['2.9000', '-0.9000', '', '3.3333']
    >>> format_column([100.0, 89.0])
    ['100', '89']
    """
    finite = [abs(v) for v in values if v is not None and math.isfinite(v)]
    largest = max(finite, default=0.0)
    if largest and not 1e-2 <= largest < 10 ** (digits + 1):
        return ["" if v is None else f"{v:.2e}" for v in values]
    whole = math.floor(math.log10(largest)) + 1 if largest else 1
    decimals = max(digits - whole, 0)
    while decimals and all(f"{v:.{decimals}f}".endswith("0") for v in finite):
        decimals -= 1
    return ["" if v is None else f"{v:z.{decimals}f}" for v in values]


def shorten(text: str, width: int) -> str:
    """Cut the beginning of a text that is too long; the end of a module path tells most.

    >>> shorten("backbone.layer4.2.bn3", 15)
    '...layer4.2.bn3'
    """
    return text if len(text) <= width else f"...{text[len(text) - width + 3 :]}"


def format_table(header: Sequence[str], columns: Sequence[Sequence[str]], *, indent: str = "  ") -> list[str]:
    r"""Return the lines of a table of at most 80 columns: the first column to the left, the others to the right.

    Where the table would be wider, the gaps shrink first, and then the first column.

    >>> print(*format_table(["layer", "mean"], [["1", "fc.bn"], ["0.5", "10.25"]]), sep="\n")
      layer    mean
      1         0.5
      fc.bn   10.25
    """
    first, *others = [max(len(cell) for cell in (head, *cells)) for head, cells in zip(header, columns, strict=True)]
    available = WIDTH - len(indent) - sum(others)
    gap = "   " if first + 3 * len(others) <= available else " "
    first = min(first, max(available - len(gap) * len(others), SHORTEST))
    lines = []
    for row in [header, *zip(*columns, strict=True)]:
        cells = [shorten(row[0], first).ljust(first), *(c.rjust(w) for c, w in zip(row[1:], others, strict=True))]
        lines.append(f"{indent}{gap.join(cells)}".rstrip())
    return lines


def format_entries(entries: Iterable[tuple[str, str]]) -> list[str]:
    r"""Return the lines of labeled texts, each text wrapped beside its label.

    >>> print(*format_entries([("CPU", "native"), ("Allocator", "glibc's")]), sep="\n")
    CPU        native
    Allocator  glibc's
    """
    entries = list(entries)
    width = max((len(label) for label, _ in entries), default=0) + 2
    return [line for label, text in entries for line in wrap(text, first=label.ljust(width), rest=" " * width)]


def wrap(text: str, *, first: str = "", rest: str = "") -> list[str]:
    """Break a text into lines of at most 80 columns, with a prefix for the first line and one for the rest."""
    lines = textwrap.wrap(text, WIDTH, initial_indent=first, subsequent_indent=rest, break_on_hyphens=False)
    return lines or [first.rstrip()]
