"""The errors of the library: one root, and a child for each kind of cause; and its warnings.

Each message names the rule and the value received.
"""

import sys
import warnings


class BatchNormError(Exception):
    """Root of all errors that the library raises on purpose."""


class InputError(BatchNormError, ValueError):
    """An argument, a tensor or an option that breaks a rule; also a ``ValueError``, as torch's own are."""


class MissingDependencyError(BatchNormError, ImportError):
    """A package that an extra of the library brings is not installed."""


class DataError(BatchNormError, ValueError):
    """A table or data set that can't be used as it is."""


class RunError(BatchNormError):
    """A comparison that can't be started, resumed or saved."""


class KernelError(BatchNormError, RuntimeError):
    """Kernels asked for by name that can't be had here."""


def warn(message: str) -> None:
    """Warn of the line that led here from outside of this library and of torch."""
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in ("batchnorm", "torch"):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, stacklevel=level)
