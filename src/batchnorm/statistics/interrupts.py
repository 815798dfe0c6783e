"""Ctrl-C deferred while an interrupt would leave a model half changed, and allowed while the user waits."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

__all__ = ["allow_interrupts", "defer_interrupts"]

Handler = Callable[[int, FrameType | None], object]


class _DeferringHandler:
    """Signal handler that calls the handler before it while interrupts are allowed, and otherwise remembers them."""

    def __init__(self, handler: Handler) -> None:
        self.handler = handler
        self.allowed = self.pending = False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if not self.allowed:
            self.pending = True
            return
        self.allowed = self.pending = False  # a second Ctrl-C must not interrupt the cleaning up after the first
        self.handler(number, frame)


def _current_handler() -> Handler | int | None:
    """Return the handler of Ctrl-C; None outside of the main thread, where Python raises no KeyboardInterrupt."""
    return signal.getsignal(signal.SIGINT) if threading.current_thread() is threading.main_thread() else None


@contextmanager
def defer_interrupts() -> Iterator[None]:
    """Defer Ctrl-C to the end of the context, except within `allow_interrupts`.

    Nothing is deferred in other threads than the main one, nor where the program handles the signal outside of Python.
    """
    handler = _current_handler()
    if not callable(handler) or isinstance(handler, _DeferringHandler):
        yield
        return
    deferring = _DeferringHandler(handler)
    signal.signal(signal.SIGINT, deferring)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
        if deferring.pending:
            handler(signal.SIGINT, None)


@contextmanager
def allow_interrupts() -> Iterator[None]:
    """Allow Ctrl-C to raise within `defer_interrupts`."""
    deferring = _current_handler()
    if not isinstance(deferring, _DeferringHandler):
        yield
        return
    deferring.allowed = True
    try:
        if deferring.pending:
            deferring(signal.SIGINT, None)
        yield
    finally:
        deferring.allowed = False
