"""Timing in a new process, with glibc's allocator as it is or tuned.

A process whose allocator was tuned can't be put back into its initial state: glibc raises the mmap threshold to the
size of freed blocks (up to 32 MB) only until the first `mallopt`. Timed in such a process, torch would pay for page
faults on arrays between 128 KB and 32 MB that it does not have otherwise.
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
from batchnorm.lab.bench.processor import ProcessorTime
from batchnorm.lab.bench.timing import Sampler, paused_gc, sampler

__all__ = ["in_new_process"]


def _serve(
    connection: Connection, build: Callable[..., Callable[[], object]], arguments: tuple[Any, ...], tuned: bool
) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C
    threads, grad, *rest = arguments
    torch.set_num_threads(threads)
    if tuned:
        tune_allocator()
    processor = ProcessorTime()
    sample = processor.watch(sampler(build(*rest)))
    with paused_gc(), torch.set_grad_enabled(grad):
        while calls := connection.recv():
            before = processor.seconds, processor.processor_seconds
            seconds = sample(calls)
            spent = processor.seconds - before[0], processor.processor_seconds - before[1]
            connection.send((seconds, spent))


@contextmanager
def in_new_process(
    build: Callable[..., Callable[[], object]],
    *arguments: Any,
    tuned: bool,
    grad: bool = True,
    processor: ProcessorTime | None = None,
) -> Iterator[Sampler]:
    """Give a sampler of the function that ``build(*arguments)`` returns in a new process with as many threads as this.

    ``processor`` counts the processor time of the samples.

    Raises
    ------
    RunError
        The process ended early, for lack of memory for instance.
    """
    context = multiprocessing.get_context("spawn")
    connection, other_end = context.Pipe()
    given = (torch.get_num_threads(), grad, *arguments)
    process = context.Process(target=_serve, args=(other_end, build, given, tuned), daemon=True)
    process.start()
    other_end.close()

    def sample(calls: int) -> float:
        try:
            connection.send(calls)
            seconds, spent = connection.recv()
        except (EOFError, OSError):
            process.join()
            raise RunError(f"a process of the benchmark ended early, with exit status {process.exitcode}") from None
        if processor is not None:
            processor.add(*spent)
        return float(seconds)

    try:
        yield sample
    finally:
        process.terminate()
        process.join()
        connection.close()
