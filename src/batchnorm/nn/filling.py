"""Loading of running statistics by their names, past the guards against changes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

__all__ = ["STATISTICS", "filling", "is_filling"]

STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
"""The buffers in the state dict, named as torch's."""

_FILLING = ContextVar("filling", default=False)


@contextmanager
def filling() -> Iterator[None]:
    """Let buffers be set by their names: frozen and paused ones too, and the layer's own even within a domain."""
    token = _FILLING.set(True)
    try:
        yield
    finally:
        _FILLING.reset(token)


def is_filling() -> bool:
    """Return whether `filling` is active in this thread."""
    return _FILLING.get()
