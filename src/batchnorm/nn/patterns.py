"""Names chosen by glob patterns, as ``layers="layer1.*"``: of layers by path, and of parameters."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable
from fnmatch import fnmatchcase

from batchnorm.errors import InputError, InputTypeError

__all__ = ["as_patterns", "matching"]

MOST_NAMES = 3
"""The error for a pattern without a match offers so many names."""


def as_patterns(patterns: str | Iterable[str], argument: str) -> list[str]:
    """Return one pattern or several as a list.

    Raises
    ------
    InputTypeError
        They are no texts.
    """
    if isinstance(patterns, str):
        return [patterns]
    found = list(patterns) if isinstance(patterns, Iterable) else [patterns]
    wrong = next((each for each in found if not isinstance(each, str)), None)
    if wrong is not None:
        raise InputTypeError(f"{argument} must be a glob pattern or several, as 'layer1.*'; got {wrong!r}")
    return found


def matching(patterns: Iterable[str], names: Collection[str], argument: str, kind: str) -> list[str]:
    """Return the names that match any of the patterns, in their order; ``*`` matches dots too.

    Parameters
    ----------
    patterns : iterable of str
        Glob patterns, as `fnmatch` has them; upper and lower case differ.
    names : collection of str
    argument : str
        The parameter that gave the patterns, for messages.
    kind : str
        The noun for a name, for messages.

    Raises
    ------
    InputError
        A pattern matches no name.
    """
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise InputError(f"each pattern in {argument} must match a {kind}; got {pattern!r}{_offer(pattern, names)}")
    return [name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns)]


def _offer(pattern: str, names: Collection[str]) -> str:
    """Return the pattern or the names that may have been meant, as the end of a sentence."""
    below = f"{pattern.rstrip('.*')}.*"
    if any(fnmatchcase(name, below) for name in names):
        return f". Did you mean {below!r}?"
    close = difflib.get_close_matches(pattern, names, n=MOST_NAMES, cutoff=0.4)
    if close:
        return f". Close to it are {', '.join(close)}"
    first = [name or "the model itself" for name in names][:MOST_NAMES]
    return f". The names begin with {', '.join(first)}" if first else ""
