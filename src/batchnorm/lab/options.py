"""Values of command line options that Typer does not parse by itself."""

from __future__ import annotations

from typing import TypeVar

from batchnorm.errors import InputError

__all__ = ["parse_numbers"]

N = TypeVar("N", int, float)


def parse_numbers(text: str, kind: type[N], name: str) -> tuple[N, ...]:
    """Parse the numbers of a comma-separated option.

    >>> parse_numbers("100,50", int, "hidden")
    (100, 50)
    """
    try:
        return tuple(kind(part) for part in text.split(","))
    except ValueError:
        described = "whole numbers" if kind is int else "numbers"
        raise InputError(f"{name} must be {described} separated by commas; got {text!r}") from None
