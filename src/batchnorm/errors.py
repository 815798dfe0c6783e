"""The errors of the library: one root, and a child for each kind of cause.

Each message names the rule and the value received.
"""


class BatchNormError(Exception):
    """Root of all errors that the library raises on purpose."""


class InputError(BatchNormError, ValueError):
    """An argument, a tensor or an option that breaks a rule; also a ``ValueError``, as torch's own are."""


class DataError(BatchNormError, ValueError):
    """A table or data set that can't be used as it is."""


class RunError(BatchNormError):
    """A comparison that can't be started, resumed or saved."""


class KernelError(BatchNormError, RuntimeError):
    """Kernels asked for by name that can't be had here."""
