"""How a private name is looked up: at the first call of its accessor, and tried before it is used."""

from __future__ import annotations

import contextlib
import functools
import importlib
import sys
import threading
import warnings
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch

__all__ = ["FOUND", "PATHS", "accessor", "itself", "look_up", "works"]

PATHS: dict[str, tuple[str, ...]] = {}
"""The private names behind each accessor."""

FOUND: set[str] = set()
"""The accessors that have been called and whose names work as known here."""

_F = TypeVar("_F", bound=Callable[..., Any])


def look_up(path: str) -> Any:
    """Return the object at a dotted path that begins with ``torch``; import modules on the way."""
    found: Any = torch
    parts = path.split(".")
    for i, part in enumerate(parts[1:], start=2):
        try:
            found = getattr(found, part)
        except AttributeError:
            found = importlib.import_module(".".join(parts[:i]))
    return found


def works(probe: Callable[[], bool]) -> bool:
    """Return whether the probe passes; it runs in a thread of its own, where no mode or transform is active."""
    passed = []

    def run() -> None:
        with contextlib.suppress(Exception), warnings.catch_warnings(action="ignore"):
            passed.append(probe() is True)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    return passed == [True]


def find(paths: Sequence[str], make: Callable[..., Any], probe: Callable[[Any], bool]) -> Any:
    """Return what ``make`` makes of the objects at the paths; None if one is missing or the probe fails."""
    try:
        made = make(*map(look_up, paths))
    except Exception:  # noqa: BLE001 (a changed torch may raise anything)
        return None
    return made if works(lambda: probe(made)) else None


def itself(found: Any) -> Any:
    """Return the argument."""
    return found


def accessor(*paths: str, probe: Callable[[Any], bool], make: Callable[..., Any] = itself) -> Callable[[_F], _F]:
    """Let private names of torch replace the decorated function at its first call, if they work as known here.

    Parameters
    ----------
    paths : str
        The private names.
    probe : callable
        Takes the substitute, and returns True if it works as known here.
    make : callable
        Takes the objects at the paths, and returns the substitute; by default the single object is the substitute.
    """

    def decorate(otherwise: _F) -> _F:
        name = otherwise.__name__
        PATHS[name] = paths
        chosen: list[Any] = []

        @functools.wraps(otherwise)
        def first_call(*arguments: Any) -> Any:
            if not chosen:
                found = find(paths, make, probe)
                if found is not None:
                    FOUND.add(name)
                chosen.append(otherwise if found is None else found)
                for module in (otherwise.__module__, __package__):
                    setattr(sys.modules[module], name, chosen[0])
            return chosen[0](*arguments)

        return first_call  # type: ignore[return-value]

    return decorate
