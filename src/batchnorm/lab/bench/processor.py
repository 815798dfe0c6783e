"""The share of the timed seconds in which the timing thread had a processor: it tells busy machines from idle ones."""

from __future__ import annotations

import time
from collections.abc import Sequence

from batchnorm.lab.bench.results import BenchRun
from batchnorm.lab.bench.timing import Sampler

__all__ = ["ENOUGH", "ProcessorTime", "busy_note"]

ENOUGH = 0.9
"""Share of the timed seconds from which a case counts as undisturbed. The timing thread also waits for torch's other
threads, most of the time in a loop, which takes processor time; where they are held up, it sleeps."""


class ProcessorTime:
    """Adds up the seconds of samples, and the seconds in which the thread that took them had a processor."""

    def __init__(self) -> None:
        self.seconds = self.processor_seconds = 0.0

    def add(self, seconds: float, processor_seconds: float) -> None:
        """Count a sample."""
        self.seconds += seconds
        self.processor_seconds += processor_seconds

    def watch(self, sample: Sampler) -> Sampler:
        """Return a sampler of this thread whose samples are counted."""

        def watched(calls: int) -> float:
            started, processor = time.perf_counter(), time.thread_time()  # the second within the first
            result = sample(calls)
            processor = time.thread_time() - processor
            self.add(time.perf_counter() - started, processor)
            return result

        return watched

    @property
    def share(self) -> float:
        """Processor time over time, at most 1."""
        return min(1.0, self.processor_seconds / self.seconds) if self.seconds else 1.0


def busy_note(run: BenchRun) -> str | None:
    """Say that other processes disturbed a run, or return None where they did not."""
    shares = [timing.processor_share for _, timing in run.timed() if timing.processor_share is not None]
    low = [share for share in shares if share < ENOUGH]
    if not low:
        return None
    return (
        f"Warning: the machine was busy, and these times can't be trusted. In {_of(low, shares)} the timing thread had "
        f"a processor for less than {ENOUGH:.0%} of the time, at worst for {min(low):.0%}{_load(run)}. Run again on an "
        "idle machine."
    )


def _of(some: Sequence[float], of: Sequence[float]) -> str:
    return f"{len(some)} of {len(of)} cases" if len(of) > 1 else "the only case"


def _load(run: BenchRun) -> str:
    machine = run.machine
    return "" if machine.load is None else f" (load average at the start: {machine.load:.1f} on {machine.cores} cores)"
