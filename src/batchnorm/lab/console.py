"""The terminal that the command line writes to."""

from __future__ import annotations

from rich.console import Console

__all__ = ["WIDTH", "console"]

WIDTH = 80


def console(*, stderr: bool = False) -> Console:
    """Return a console of at most 80 columns that prints text unchanged."""
    out = Console(stderr=stderr, markup=False, highlight=False, emoji=False)
    out.width = min(WIDTH, out.width)
    return out
