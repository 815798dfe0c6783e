"""Times of several functions, measured in turn, so that a disturbance of the machine affects all of them."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

__all__ = ["Quartiles", "Sampler", "Tick", "interleaved", "paused_gc", "quartiles", "ratios", "sampler"]

Sampler = Callable[[int], float]
"""Makes this many calls in a row, and returns the seconds per call."""

Tick = Callable[[float], None]
"""Called with the share of a measurement that is done, between samples."""

SAMPLE = 2e-3
ROUNDS = 5


@dataclass(frozen=True)
class Quartiles:
    """Median and quartiles."""

    median: float
    low: float
    high: float


def quartiles(values: list[float]) -> Quartiles:
    """Return the median and the quartiles of some values."""
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return Quartiles(median, low, high)


def ratios(numerators: list[float], denominators: list[float]) -> list[float]:
    """Return the ratio of each round."""
    return [a / b for a, b in zip(numerators, denominators, strict=True)]


def sampler(call: Callable[[], object], clock: Callable[[], float] = time.perf_counter) -> Sampler:
    """Return a sampler of a function in this process."""

    def sample(calls: int) -> float:
        started = clock()
        for _ in range(calls):
            call()
        return (clock() - started) / calls

    return sample


@contextmanager
def paused_gc() -> Iterator[None]:
    """Keep the garbage collector from running."""
    was_enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _calls(sample: Sampler) -> int:
    """Return how many calls make a sample that is long enough for the clock, and warm up on the way."""
    sample(1)
    calls = 1
    while (seconds := calls * sample(calls)) < SAMPLE:
        calls = 2 * calls if seconds < SAMPLE / 4 else calls + max(1, calls // 4)
    return calls


def interleaved(
    samplers: dict[str, Sampler],
    seconds: float,
    *,
    rounds: int = ROUNDS,
    clock: Callable[[], float] = time.perf_counter,
    tick: Tick | None = None,
) -> dict[str, list[float]]:
    """Sample every function once per round, for at least the given seconds and the given rounds.

    Every other round takes them in the opposite order. Returns the seconds per call of each, by round. ``tick`` is
    called after every round.
    """
    times: dict[str, list[float]] = {name: [] for name in samplers}
    with paused_gc():
        calls = {name: _calls(sample) for name, sample in samplers.items()}
        started, done = clock(), 0
        end = started + seconds
        while done < rounds or clock() < end:
            for name in list(samplers)[:: -1 if done % 2 else 1]:
                times[name].append(samplers[name](calls[name]))
            done += 1
            if tick is not None:
                passed = (clock() - started) / seconds if seconds else 1.0
                tick(min(1.0, done / rounds, passed))
    return times
