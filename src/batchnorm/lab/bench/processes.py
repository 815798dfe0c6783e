"""A side that runs in a process of its own, with glibc's allocator as it is or tuned.

In one process the allocator could be tuned and then set back, but not to what an untouched process has: after any
`mallopt` of its threshold glibc no longer raises it by itself to the size of the blocks that are freed (up to 32 MB),
so that torch would be charged for page faults, on arrays between 128 KB and 32 MB, that it does not have at home.
"""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from typing import Any

import torch

from batchnorm.errors import RunError
from batchnorm.kernels.allocator import tune_allocator
from batchnorm.lab.bench.timing import Sampler, quiet, sampler

__all__ = ["elsewhere"]


def _serve(
    connection: Connection, build: Callable[..., Callable[[], object]], arguments: tuple[Any, ...], tuned: bool
) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to answer
    threads, grad, *rest = arguments
    torch.set_num_threads(threads)
    if tuned:
        tune_allocator()
    sample = sampler(build(*rest))
    with quiet(), torch.set_grad_enabled(grad):
        while calls := connection.recv():
            connection.send(sample(calls))


@contextmanager
def elsewhere(
    build: Callable[..., Callable[[], object]], *arguments: Any, tuned: bool, grad: bool = True
) -> Iterator[Sampler]:
    """Time the function that ``build(*arguments)`` returns in a new process of as many threads as this one.

    Raises
    ------
    RunError
        The process ended by itself, as for want of memory.
    """
    context = multiprocessing.get_context("spawn")
    connection, theirs = context.Pipe()
    given = (torch.get_num_threads(), grad, *arguments)
    process = context.Process(target=_serve, args=(theirs, build, given, tuned), daemon=True)
    process.start()
    theirs.close()

    def sample(calls: int) -> float:
        try:
            connection.send(calls)
            return float(connection.recv())
        except (EOFError, OSError):
            process.join()
            raise RunError(f"each side must run to its end; a process ended with status {process.exitcode}") from None

    try:
        yield sample
    finally:
        process.terminate()
        process.join()
        connection.close()
