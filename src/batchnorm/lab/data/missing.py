"""Texts that stand for a missing value."""

from __future__ import annotations

from collections.abc import Sequence

import polars as pl

__all__ = ["is_placeholder", "is_symbol", "stripped", "without_missing"]

ALWAYS = {"", "NA", "N/A", "n/a", "NaN", "nan", "NULL", "null", "None", "?"}
ALWAYS |= {"N.A.", "n.a.", "<NA>", "#NA", "#N/A", "#N/A N/A", "NaT", "\\N", "(null)", "<null>"}
ALWAYS |= {"#DIV/0!", "#REF!", "#VALUE!", "#NAME?", "#NUM!", "#NULL!"}
"""Texts that are missing values in every column."""

WORDS = {"na", "n/a", "nan", "n.a", "n.a.", "nil", "none", "null", "missing", "blank", "(blank)", "empty", "(empty)"}
WORDS |= {"unknown", "undefined", "unspecified", "not available", "not applicable", "not known", "not specified"}
WORDS |= {"no data", "no answer", "no response", "prefer not to say", "refused", "don't know", "do not know", "tbd"}
WORDS |= {"not reported", "not recorded", "invalid", "error"}
"""Texts, in lower case, that are missing values in a column of numbers, and categories in one of texts."""

SYMBOL = r"^[^\p{L}\p{N}]+$"
"""Marks alone, such as "-" and "..": missing values in a column of numbers."""

INVISIBLE = "\ufeff\u200b\u200c\u200d\u2060\u00ad\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"


def stripped(texts: pl.Series) -> pl.Series:
    """Return texts without blanks and invisible characters around them."""
    return texts.str.strip_chars(INVISIBLE).str.strip_chars()


def without_missing(texts: pl.Series, further: Sequence[str]) -> pl.Series:
    """Return stripped texts, with a null in place of those that stand for a missing value in every column."""
    given = {text.strip().lower() for text in further}
    missing = texts.is_in(list(ALWAYS))
    if given:
        missing |= texts.str.to_lowercase().is_in(list(given))
    return texts.set(missing.fill_null(False), None)


def is_placeholder(texts: pl.Series) -> pl.Series:
    """Return which texts stand for a missing value in a column of numbers.

    >>> is_placeholder(pl.Series(["-", "Prefer not to say", "12", "Rome"])).to_list()
    [True, True, False, False]
    """
    return texts.str.to_lowercase().is_in(list(WORDS)) | texts.str.contains(SYMBOL)


def is_symbol(text: str) -> bool:
    """Return whether a text has neither letters nor digits, as "-" has none."""
    return not any(character.isalnum() for character in text)
