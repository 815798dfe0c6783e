"""Packages of the extras: whether they are installed, and the error where one is missing."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager

from batchnorm.errors import MissingDependencyError

__all__ = ["are_installed", "needs"]


def are_installed(*packages: str) -> bool:
    """Return whether all of these top-level packages can be found, without importing them."""
    return all(map(_is_installed, packages))


def _is_installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except (ImportError, ValueError):  # an import hook hides it, or something else has taken its name
        return False


@contextmanager
def needs(feature: str, extra: str = "lab") -> Iterator[None]:
    """Import packages of an extra, or say how to install them.

    Raises
    ------
    MissingDependencyError
        A package is missing, or too old to have a name that is imported.
    """
    try:
        yield
    except MissingDependencyError:
        raise
    except ImportError as error:
        package = (error.name or "").partition(".")[0]
        if package == "batchnorm":
            raise
        missing = isinstance(error, ModuleNotFoundError) and package
        reason = f"{package} is not installed" if missing else f"an import failed: {error}"
        message = f"{feature} needs pip install 'batchnorm[{extra}]'; {reason}"
        raise MissingDependencyError(message, name=error.name) from error
