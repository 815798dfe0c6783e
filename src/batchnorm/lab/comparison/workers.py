"""Processes that train stacks: each stack on one thread, and kept in run.json as soon as it is finished."""

from __future__ import annotations

import os
import signal
import tempfile
import threading
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import numpy as np
from joblib import Parallel, delayed
from joblib.externals.loky.process_executor import TerminatedWorkerError

from batchnorm.errors import RunError
from batchnorm.kernels.allocator import tune_allocator
from batchnorm.lab.comparison.run_file import RunFile, TrainedStack
from batchnorm.lab.data.dataset import Dataset
from batchnorm.lab.training.stacks import Stack
from batchnorm.lab.training.threads import limited_threads
from batchnorm.lab.training.train import train

__all__ = ["Progress", "Workers"]

POLL_SECONDS = 0.2


class Progress(Protocol):
    """Receiver of the progress of the training, counted in gradient steps of single runs."""

    def begin(self, phase: str) -> None:
        """Name the phase that begins."""

    def plan(self, arm: str, steps: int) -> None:
        """Expect some more steps of an arm's runs, or fewer where the number is negative."""

    def advance(self, arm: str, steps: int) -> None:
        """Count some steps of an arm's runs as taken."""

    def say(self, sentence: str) -> None:
        """Tell the user something."""


def _train_stack(
    stack: Stack, dataset: Dataset, taken: np.memmap[Any, Any], index: int, main_process: int
) -> TrainedStack:
    """Train one stack on one thread; runs in a worker, and leaves the number of steps taken in a shared file."""
    if os.getpid() != main_process:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes, and the main one handles it
        tune_allocator()  # the worker's process is ours alone

    def progress(step: int) -> None:
        taken[index] = step

    started = time.perf_counter()
    with limited_threads(1):
        runs = train(stack, dataset, progress)
    return TrainedStack(stack.key, stack.phase, stack.arm, round(time.perf_counter() - started, 3), runs)


class _Watch(threading.Thread):
    """Reports the steps that the workers have taken, which it reads from the shared file."""

    def __init__(self, stacks: Sequence[Stack], taken: np.memmap[Any, Any], progress: Progress) -> None:
        super().__init__(daemon=True)
        self.stacks, self.taken, self.progress = stacks, taken, progress
        self.reported = [0] * len(stacks)
        self.over = threading.Event()

    def run(self) -> None:
        while not self.over.wait(POLL_SECONDS):
            for index, stack in enumerate(self.stacks):
                self.report(index, stack, int(self.taken[index]))

    def report(self, index: int, stack: Stack, steps: int) -> None:
        """Report the steps of a stack that are not reported yet."""
        self.progress.advance(stack.arm, (steps - self.reported[index]) * len(stack.seeds))
        self.reported[index] = steps

    def stop(self) -> None:
        """Stop reading the shared file."""
        self.over.set()
        self.join()

    def finish(self) -> None:
        """Count as taken the steps that stacks that stopped early did not need."""
        for index, stack in enumerate(self.stacks):
            self.report(index, stack, stack.settings.steps)


@contextmanager
def _no_interrupt() -> Iterator[None]:
    """Block Ctrl-C in this process until the block ends, and in the processes that are started within it."""
    if not hasattr(signal, "pthread_sigmask") or threading.current_thread() is not threading.main_thread():
        yield
        return
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})


class Workers:
    """Trains stacks in processes, and saves each in run.json as it is finished."""

    def __init__(self, dataset: Dataset, run: RunFile, jobs: int, progress: Progress) -> None:
        self.dataset, self.run, self.jobs, self.progress = dataset, run, jobs, progress

    def train(self, stacks: Sequence[Stack]) -> None:
        """Train the stacks that run.json does not have yet."""
        finished = {stack.key for stack in self.run.stacks}
        waiting = [stack for stack in stacks if stack.key not in finished]
        for stack in stacks:
            if stack.key in finished:
                self.progress.advance(stack.arm, stack.settings.steps * len(stack.seeds))
        if not waiting:
            return
        with tempfile.NamedTemporaryFile() as file:
            taken: np.memmap[Any, Any] = np.memmap(file.name, np.int64, "w+", shape=(len(waiting),))
            watch = _Watch(waiting, taken, self.progress)
            parallel = Parallel(n_jobs=self.jobs, return_as="generator_unordered")
            with _no_interrupt():
                trained = parallel(
                    delayed(_train_stack)(stack, self.dataset, taken, i, os.getpid()) for i, stack in enumerate(waiting)
                )
            watch.start()
            try:
                for stack in trained:
                    self.run.stacks.append(stack)
                    self.run.save()
            except TerminatedWorkerError as error:
                raise RunError(
                    f"training must not be ended from outside (is there memory for {self.jobs} jobs?); the finished "
                    f"stacks are kept in {str(self.run.folder)!r}, and resuming trains the rest"
                ) from error
            finally:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # joblib warns that tasks are cancelled, as intended
                    trained.close()
                watch.stop()
            watch.finish()
