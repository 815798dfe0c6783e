"""Ctrl-C held back where it would leave things half done, and let through where a user waits."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

__all__ = ["held_back", "let_through"]


class _Interrupts:
    """Whether Ctrl-C may raise at this moment, and whether one waits that could not."""

    def __init__(self, handler: Callable[[int, FrameType | None], object]) -> None:
        self.handler = handler
        self.let_through = self.waiting = False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if not self.let_through:
            self.waiting = True
            return
        self.let_through = self.waiting = False  # what cleans up after this one is not interrupted again
        self.handler(number, frame)


def _current() -> _Interrupts | None:
    handler = signal.getsignal(signal.SIGINT) if threading.current_thread() is threading.main_thread() else None
    return handler if isinstance(handler, _Interrupts) else None


@contextmanager
def held_back() -> Iterator[None]:
    """Hold Ctrl-C back within, but for `let_through`; at the end one that waits is raised.

    Where Ctrl-C raises nothing, in other threads than the main one and where a program handles it in its own way
    outside of Python, nothing is done.
    """
    handler = signal.getsignal(signal.SIGINT) if threading.current_thread() is threading.main_thread() else None
    if not callable(handler) or isinstance(handler, _Interrupts):
        yield
        return
    interrupts = _Interrupts(handler)
    signal.signal(signal.SIGINT, interrupts)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
        if interrupts.waiting:
            handler(signal.SIGINT, None)


@contextmanager
def let_through() -> Iterator[None]:
    """Let Ctrl-C raise within."""
    interrupts = _current()
    if interrupts is None:
        yield
        return
    interrupts.let_through = True
    try:
        if interrupts.waiting:
            interrupts(signal.SIGINT, None)
        yield
    finally:
        interrupts.let_through = False
