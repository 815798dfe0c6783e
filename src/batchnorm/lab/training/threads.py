"""The number of threads that torch computes with, limited while a small network is trained or run.

On a network whose mini-batches take a millisecond, a second thread saves no time, but spins while it waits for work
(OpenMP's default), and so takes a whole core; beside other work it delays the first thread as well.

``torch.set_num_threads`` sets the number of the calling thread, and the one that other threads take when they use torch
for the first time. A limit is for the calling thread alone: the number of new threads is set back at once.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

__all__ = ["limited_threads", "threads_for"]

WORK_PER_THREAD = 400e6
"""Bytes of weights, times rows, times products per weight and row, that keep a thread busy for long enough.

On an idle machine two threads gain from much less on, but they lose far more where other work keeps a core busy. At
twice this work they gain about half (benchmarks/estimators.py).
"""

_lock = threading.Lock()


def threads_for(network: nn.Module, rows: int, products: int) -> int:
    """Return how many threads a network should take at most.

    Parameters
    ----------
    network : Module
    rows : int
        Rows per mini-batch.
    products : int
        Products per weight and row: 1 for a forward pass, 3 with the backward pass.
    """
    weights = sum(weight.numel() * weight.element_size() for weight in network.parameters())
    return max(1, int(weights * rows * products / WORK_PER_THREAD))


@contextmanager
def limited_threads(limit: int) -> Iterator[None]:
    """Let torch compute with at most so many threads in this thread, and restore its number at the end."""
    with _lock:  # so that no other limit is taken for the number of this thread, when it is new to torch
        number = torch.get_num_threads()
    if limit >= number:
        yield
        return
    try:
        with _lock:
            torch.set_num_threads(limit)
            setter = threading.Thread(target=torch.set_num_threads, args=(number,))  # for new threads
            setter.start()
            setter.join()
        yield
    finally:
        torch.set_num_threads(number)
