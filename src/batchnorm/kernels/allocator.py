"""glibc's allocator, told to keep what is freed."""

from __future__ import annotations

import ctypes

__all__ = ["tune_allocator"]

M_TRIM_THRESHOLD = -1
M_MMAP_THRESHOLD = -3
KEPT_BYTES = 2**31 - 1


def tune_allocator() -> bool:
    """Let glibc keep freed blocks of this process, so that large activations are not page-faulted anew each step.

    Sets ``M_MMAP_THRESHOLD`` and ``M_TRIM_THRESHOLD`` (see ``man 3 mallopt``) to 2 GiB. Memory that the process has
    once used then stays with it.

    Returns
    -------
    bool
        Whether the allocator took both; False where it is not glibc's.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # not glibc; TypeError on Windows
        return False
    return bool(mallopt(M_TRIM_THRESHOLD, KEPT_BYTES)) and bool(mallopt(M_MMAP_THRESHOLD, KEPT_BYTES))
