"""Numbers as people write them: $213,700, 1.3%, (1,200), 1.234,5 or 1,735 sqft.

A comma or point that is followed by exactly three digits can be a decimal mark or a mark of thousands. The other
numbers of a column decide, and then the other columns.
"""

from __future__ import annotations

from dataclasses import dataclass

import polars as pl

from batchnorm.lab.data.units import CURRENCY, UNIT, split_factor, with_one_unit

__all__ = [
    "DecimalMarks",
    "ambiguous_cells",
    "count_decimal_marks",
    "count_plain_marks",
    "only_plain_numbers",
    "parse_numbers",
    "plain_numbers",
]

DIGITS = r"(?:\d[\d.,' ]*\d|\d)[.,]?|[.,]\d+"
NUMBER = rf"^([-+]?)\s*({CURRENCY})?\s*([-+]?)({DIGITS})(?:[eE]([-+]?\d+))?(\s?)({UNIT})?$"

MINUS = r"^[\u2010-\u2015\u2212\ufe63\uff0d]"
FOOTNOTE = r"(?:^|[^\p{L}\p{No}])\p{No}|\d\p{Lm}"
"""A raised digit or letter behind a number, or a digit in a circle; behind a letter it belongs to a unit, as in m²."""

APOSTROPHES = "[\u2019`\u00b4]"
BLANKS = r"[\u00a0\u2007\u2009\u202f\t]"

AMBIGUOUS = r"^[1-9]\d{0,2}[.,]\d{3}$"
SIGNED_AMBIGUOUS = rf"^[-+]?{AMBIGUOUS[1:]}"
COMMA_DECIMAL = r"^\d{1,3}(?:\.\d{3})+,\d*$|^\d{1,3}(?:\.\d{3}){2,}$|^\d*,\d*$"
POINT_DECIMAL = r"^\d{1,3}(?:,\d{2,3})*,\d{3}\.\d*$|^\d{1,3}(?:,\d{2,3})*,\d{3}$|^\d*\.\d*$"
GROUPED = r"^\d{1,3}(?:[' ]\d{3})+(?:[.,]\d*)?$"


@dataclass(frozen=True)
class DecimalMarks:
    """Numbers of cells of a column: those that must have a decimal comma or a decimal point, and all filled ones."""

    comma: int
    point: int
    filled: int

    @property
    def show_comma(self) -> bool:
        """Whether at least a tenth of the cells have a decimal comma; a few odd ones are not enough."""
        return self.comma > self.point and 10 * self.comma >= self.filled


def plain_numbers(texts: pl.Series) -> pl.Series:
    """Return texts as float64, and null for those that are not as Python writes a finite number."""
    numbers = texts.cast(pl.Float64, strict=False)
    return numbers.set(~numbers.is_finite().fill_null(True), None)


def _groups(texts: pl.Series) -> pl.DataFrame:
    """Return the parts of numbers; all are null for a text that is none."""
    tidy = (
        texts.set(texts.str.contains(FOOTNOTE).fill_null(False), None)
        .str.normalize("NFKC")
        .str.replace_all(BLANKS, " ")
        .str.replace(MINUS, "-")
        .str.replace_all(APOSTROPHES, "'")
    )
    tidy = tidy.str.replace(r"""^="(.*)"$""", "$1").str.replace(r"^'(\d)", "$1")
    tidy = tidy.str.replace(rf"^({CURRENCY})?\s*\(\s*(\P{{L}}*\d\P{{L}}*)\s*\)$", "-$1$2").str.replace(
        r"^(.*\d)\s?-$", "-$1"
    )
    names = ["sign", "currency", "inner_sign", "digits", "exponent", "blank", "unit"]
    return tidy.str.extract_groups(NUMBER).struct.rename_fields(names).struct.unnest()


def _mantissa(digits: pl.Series) -> pl.Series:
    """Return digits without blanks and apostrophes between thousands; null where these stand elsewhere."""
    grouped = digits.str.contains("[' ]")
    valid = ~grouped | digits.str.contains(GROUPED)
    return digits.str.replace_all("[' ]", "").set(~valid.fill_null(True), None)


def count_decimal_marks(texts: pl.Series) -> DecimalMarks:
    """Count the numbers of a column that show which decimal mark they have."""
    possible = texts.filter(texts.str.contains(r"\d[.,]|[.,]\d").fill_null(False))
    digits = _mantissa(_groups(possible)["digits"]).drop_nulls()
    sure = digits.filter(~digits.str.contains(AMBIGUOUS))
    comma = sure.str.contains(COMMA_DECIMAL) & sure.str.contains("[,.]")
    point = sure.str.contains(POINT_DECIMAL) & sure.str.contains("[,.]") & ~comma
    return DecimalMarks(int(comma.sum()), int(point.sum()), texts.len() - texts.null_count())


def count_plain_marks(texts: pl.Series) -> DecimalMarks:
    """Count the decimal points of a column of plain numbers, none of which is ambiguous."""
    return DecimalMarks(0, int(texts.str.contains(".", literal=True).sum()), texts.len() - texts.null_count())


def ambiguous_cells(texts: pl.Series) -> pl.Series:
    """Return which plain numbers have a point that could be between thousands, as in 1.234."""
    return texts.str.contains(SIGNED_AMBIGUOUS).fill_null(False)


def parse_numbers(texts: pl.Series, comma: bool) -> tuple[pl.Series, pl.Series]:
    """Return texts as numbers (null for those that are none), and whether each was written with further marks.

    Numbers with different units are not comparable: those with the most frequent unit are numbers.

    Parameters
    ----------
    texts : Series of str
    comma : bool
        Whether an ambiguous number, such as 1,234 or 1.234, has a decimal comma.

    Examples
    --------
    >>> parse_numbers(pl.Series(["$213,700", "1.3", "(1,200)", "Rome"]), comma=False)[0].to_list()
    [213700.0, 1.3, -1200.0, None]
    """
    plain = plain_numbers(texts)
    marked = texts.is_not_null() & (plain.is_null() | (texts.str.contains(SIGNED_AMBIGUOUS) & comma))
    if not marked.any():
        return _whole(texts, plain), marked
    rows = marked.arg_true()
    values = _parse(texts.gather(rows), comma, texts.len() - texts.null_count())
    whole = bool((values.drop_nulls() == values.drop_nulls().round()).all())
    found = plain.scatter(rows, values)
    marked &= found.is_not_null()
    ints = texts.filter(~marked & found.is_not_null()).str.contains(r"^[-+]?\d+$").all()
    return found.cast(pl.Int64) if whole and ints and _fits(found) else found, marked


def _fits(numbers: pl.Series) -> bool:
    largest = numbers.abs().max()
    return isinstance(largest, float) and largest < 2**53


def only_plain_numbers(texts: pl.Series) -> pl.Series | None:
    """Return texts as numbers if each is one as Python writes it, or null; None where one is another text."""
    plain = plain_numbers(texts)
    return _whole(texts, plain) if plain.null_count() == texts.null_count() < texts.len() else None


def _whole(texts: pl.Series, plain: pl.Series) -> pl.Series:
    """Return numbers as whole ones where all are."""
    known = texts.filter(plain.is_not_null())
    if known.len() and known.str.contains(r"^[-+]?\d+$").all():
        ints = texts.cast(pl.Int64, strict=False)
        if ints.null_count() == plain.null_count():
            return ints
    return plain


def _parse(texts: pl.Series, comma: bool, numbers: int) -> pl.Series:
    """Return the values of numbers with marks; null for other texts, and for those of less frequent units."""
    parts = _groups(texts)
    digits = _mantissa(parts["digits"])
    ambiguous = pl.when(pl.col("digits").str.contains(AMBIGUOUS)).then(pl.lit(comma))
    frame = parts.with_columns(digits=digits).with_columns(
        comma=ambiguous.otherwise(
            pl.col("digits").str.contains(COMMA_DECIMAL) & ~pl.col("digits").str.contains(r"^\d*$")
        )
    )
    valid = pl.col("comma") | pl.col("digits").str.contains(rf"{POINT_DECIMAL}|^\d+$")
    mantissa = (
        pl.when(pl.col("comma"))
        .then(pl.col("digits").str.replace_all(".", "", literal=True).str.replace(",", ".", literal=True))
        .otherwise(pl.col("digits").str.replace_all(",", "", literal=True))
    )
    negative = (pl.col("sign") + pl.col("inner_sign")) == "-"
    twice = (pl.col("sign") + pl.col("inner_sign")).str.len_chars() > 1
    power = pl.lit("e") + pl.col("exponent").fill_null("0")
    units = split_factor(parts)
    found = frame.select(
        value=pl.when(valid & ~twice).then((mantissa + power).cast(pl.Float64, strict=False))
        * units["factor"].fill_null(1.0)
        * pl.when(negative).then(-1.0).otherwise(1.0)
    )["value"]
    return with_one_unit(found.set(~found.is_finite().fill_null(True), None), units, numbers)
