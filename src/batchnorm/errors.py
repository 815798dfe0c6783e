"""Errors and warnings of the library.

::

    BatchNormError
    |-- InputError (ValueError)               an argument, a tensor or an option has a value that breaks a rule
    |-- InputTypeError (TypeError)            an argument has the wrong type
    |-- UnsupportedError (RuntimeError)       the library cannot do this here, whatever the values are
    |-- DistributedError (RuntimeError)       a rank is missing, has failed, or does something else than the others
    |-- MissingDependencyError (ImportError)  a package of an extra is not installed
    |-- DivergedError (ArithmeticError)       training or measuring gave numbers that are not finite
    |-- DataError (ValueError)                a table or a data set cannot be used as it is
    |-- RunError (RuntimeError)               a comparison cannot be started, resumed or saved
    `-- KernelError (RuntimeError)            kernels that were asked for by name do not run here

Every message states the rule, then the value received, then a way out where there is one.
"""

from __future__ import annotations

import sys
import warnings

__all__ = [
    "BatchNormError",
    "DataError",
    "DistributedError",
    "DivergedError",
    "InputError",
    "InputTypeError",
    "KernelError",
    "MissingDependencyError",
    "RunError",
    "UnsupportedError",
    "warn",
]


class BatchNormError(Exception):
    """Root of all errors that the library raises on purpose."""


class InputError(BatchNormError, ValueError):
    """An argument, a tensor or an option has a value that breaks a rule."""


class InputTypeError(BatchNormError, TypeError):
    """An argument has the wrong type."""


class UnsupportedError(BatchNormError, RuntimeError):
    """The library cannot do this here, whatever the values of the arguments are."""


class DistributedError(BatchNormError, RuntimeError):
    """A process of the group is missing, has failed, or does something else than the others."""


class MissingDependencyError(BatchNormError, ImportError):
    """A package that an extra of the library brings is not installed."""


class DivergedError(BatchNormError, ArithmeticError):
    """Training or measuring gave numbers that are not finite."""


class DataError(BatchNormError, ValueError):
    """A table or a data set cannot be used as it is."""


class RunError(BatchNormError, RuntimeError):
    """A comparison cannot be started, resumed or saved."""


class KernelError(BatchNormError, RuntimeError):
    """Kernels that were asked for by name do not run here."""


def warn(message: str, category: type[Warning] = UserWarning) -> None:
    """Emit a warning attributed to the first caller outside batchnorm and torch."""
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in ("batchnorm", "torch"):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, category, stacklevel=level)
