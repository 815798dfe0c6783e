"""The separator of the cells of a text file."""

from __future__ import annotations

import csv
import re

__all__ = ["as_tabbed", "separator_of", "split_separator_line"]

SEPARATORS = "\t;|,"
"""Separators, the first of which is taken where several split all lines alike: a comma can be a decimal mark too."""

SAMPLE = 50
NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?$")


def split_separator_line(text: str) -> tuple[str, str | None]:
    r"""Return a text with an empty first line in place of Excel's line "sep=;", and the separator that it names.

    >>> split_separator_line("sep=;\na;b")
    ('\na;b', ';')
    """
    found = re.match(r'"?sep=(.|\t)"?[^\S\n]*(?=\n|$)', text, re.IGNORECASE)
    return (text[found.end() :], found[1]) if found else (text, None)


def separator_of(text: str) -> str | None:
    """Return the separator that splits most lines into as many cells as the first; None where there is none.

    Comments and empty lines do not count, and neither do separators in quotes.
    """
    lines = [line for line in text[: 1 << 20].split("\n") if line.strip() and not line.startswith("#")][:SAMPLE]
    best, found = (0.0, 0), None
    for separator in SEPARATORS:
        counts = [len(row) for row in csv.reader(lines, delimiter=separator, skipinitialspace=True) if row]
        if max(counts, default=0) < 2:
            continue
        width = counts[0] if counts[0] > 1 else 0  # a title may stand above the header
        score = (counts.count(width) / len(counts), width)
        if found is None or score > best:
            best, found = score, separator
    return found


def as_tabbed(text: str) -> str | None:
    """Return a text whose cells are separated by blanks with tabs in their place; None for any other text.

    Only numbers are recognized in this way: each line has as many words as the others, most of which are numbers.
    """
    lines = [line.split() for line in text.split("\n")]
    filled = [words for words in lines if words and not words[0].startswith("#")]
    widths = {len(words) for words in filled}
    if len(widths) != 1 or min(widths) < 2:
        return None
    words = [word for words in filled[1:SAMPLE] for word in words]
    if 2 * sum(NUMBER.match(word) is not None for word in words) <= len(words):
        return None
    return "\n".join(line if line.startswith("#") else "\t".join(line.split()) for line in text.split("\n"))
