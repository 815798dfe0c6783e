"""Texts around the digits of a number: units, currencies and factors.

A word behind a number is a unit only if it is a known one or several cells have it; otherwise "60 Rome" and "3 or more"
would be numbers.
"""

from __future__ import annotations

import polars as pl

__all__ = ["CURRENCY", "UNIT", "split_factor", "with_one_unit"]

CODES = "USD|EUR|GBP|CHF|JPY|CNY|INR|CAD|AUD|NZD|SEK|NOK|DKK|PLN|CZK|BRL|MXN|ZAR"
CURRENCY = rf"(?:US|CA|AU|NZ|HK|R|A|C|S)?\p{{Sc}}|{CODES}|Rs\.?|Fr\."
WORD = r"(?:\p{Sc}|[%‰°\"'\u2032\u2033]|[\p{L}µ]+\.?[23²³]?)"
UNIT = rf"{WORD}(?:[ /·]?{WORD})*"

FACTORS = {"k": 1e3, "K": 1e3, "M": 1e6, "mn": 1e6, "bn": 1e9, "B": 1e9}
"""Factors that stand directly behind a number, as in 1.2M."""

WORD_FACTORS = {"thousand": 1e3, "tsd": 1e3, "lakh": 1e5, "lac": 1e5, "million": 1e6, "mio": 1e6, "mln": 1e6}
WORD_FACTORS |= {"crore": 1e7, "billion": 1e9, "milliard": 1e9, "mrd": 1e9, "bn": 1e9, "trillion": 1e12}
"""Factors in words, with a blank in front or not."""

OF_MONEY = {"k": 1e3, "m": 1e6, "b": 1e9, "t": 1e12}
"""Factors of an amount with a currency, as in £5m."""

NAMES = """
% ‰ ° °c °f °k ' " \u2032 \u2032\u2032 percent pct kr zł lei rub kg mg \u03bcg lb oz ton tonne km cm mm \u03bcm nm mi
mile ft feet foot in inch inche yd yard meter metre sqft sqm sqkm acre ha m2 m3 cm2 cm3 km2 ft2 ft3 ml cl liter litre
gal gallon cc ms sec second min minute hr hour day week month year yr mph kmh km/h m/s kph mpg hp bhp ps kw mw kwh mwh
hz khz mhz ghz kb mb gb tb pa hpa kpa mpa bar psi mmhg kj kcal cal mv kv ma mah db ppm ppb g/l mg/l g/dl mg/dl mmol/l
px bpm rpm kg/m2 kg/m3 g/cm3
"""
KNOWN = frozenset(NAMES.split())
"""Units that one cell alone can have: in lower case, without blanks, points and the "s" of a plural."""

LETTERS = {"m", "g", "l", "h", "s", "t"}
"""Units of one letter, which one cell alone can have behind a blank."""

NO_UNIT = r"(?i)(?:^|\s)(?:or|and|to|than|more|less|over|under|plus|up|about|of)(?:\s|$)"
"""Words that no unit has."""

MIN_SHARE = 0.1
"""Share of the numbers that must have a unit that is not known."""


def _key(unit: pl.Expr) -> pl.Expr:
    """Return units as they are compared: "sq. ft." is "sqft", and "lbs" is "lb"."""
    return unit.str.to_lowercase().str.replace_all("[ .]", "").str.replace(r"(\p{L}{2})s$", "$1")


def split_factor(parts: pl.DataFrame) -> pl.DataFrame:
    """Return factor, unit and whether a text is a code, for the parts of each number.

    Parameters
    ----------
    parts : DataFrame
        Columns "currency", "digits", "blank" and "unit"; what is absent is null or empty.
    """
    named = _key(pl.col("unit").str.extract(r"(?i)^(\p{L}+)\.?(?:\s|\p{Sc}|$)"))
    word = named.replace_strict(WORD_FACTORS, default=None, return_dtype=pl.Float64)
    currency = pl.col("currency").fill_null("") + pl.col("unit").str.extract(rf"({CURRENCY})$").fill_null("")
    letters = pl.col("unit").str.extract(rf"^(\p{{L}}{{1,2}})\s?(?:{CURRENCY})?$")
    glued = pl.when(pl.col("blank") == "").then(
        letters.replace_strict(FACTORS, default=None, return_dtype=pl.Float64).fill_null(
            pl.when(currency != "").then(
                letters.str.to_lowercase().replace_strict(OF_MONEY, default=None, return_dtype=pl.Float64)
            )
        )
    )
    rest = (
        pl.when(word.is_not_null())
        .then(pl.col("unit").str.replace(r"^\p{L}+\.?\s*", ""))
        .when(glued.is_not_null())
        .then(pl.col("unit").str.replace(r"^\p{L}{1,2}\s*", ""))
        .otherwise(pl.col("unit"))
        .fill_null("")
    )
    letter = pl.when((pl.col("blank") == "") & pl.col("unit").str.contains(r"^\p{Lu}$")).then("unit")
    shown = (currency != "") | pl.col("digits").str.contains("[.,]").fill_null(False)
    found = parts.select(
        factor=pl.coalesce(word, glued),
        unit=_key(pl.concat_str(pl.col("currency").fill_null(""), rest)),
        is_money=currency != "",
        glued=(pl.col("blank") == ""),
        refused=rest.str.contains(NO_UNIT),
        letter=letter,
        shown=shown,
    )
    amounts = set(found.filter(pl.col("shown") & pl.col("letter").is_not_null())["letter"])
    return found.with_columns(code=pl.col("letter").is_not_null() & ~pl.col("letter").is_in(list(amounts)))


def with_one_unit(values: pl.Series, units: pl.DataFrame, numbers: int) -> pl.Series:
    """Return the numbers of the most frequent unit and those without one; null for the others.

    Parameters
    ----------
    values : Series
        Null for a text that is no number.
    units : DataFrame
        Result of `split_factor`.
    numbers : int
        Number of the cells of the column that are filled.
    """
    values = values.set(units["code"] | units["refused"], None)
    with_unit = units.with_columns(value=values).filter(pl.col("value").is_not_null() & (pl.col("unit") != ""))
    if not with_unit.height:
        return values
    counts = (
        with_unit.group_by("unit")
        .agg(pl.len(), money=pl.col("is_money").any(), glued=pl.col("glued").all())
        .sort(["len", "unit"], descending=[True, False])
    )
    most, count, money, glued = counts.row(0)
    known = money or most in KNOWN or (most in LETTERS and not glued)
    if not known and count < max(2, MIN_SHARE * numbers):
        return values.set(units["unit"] != "", None)
    other = ~units["unit"].is_in(["", most])
    if not money:
        other |= units["factor"].is_not_null() & (units["unit"] == "")
    return values.set(other, None)
