"""Times of several things, taken in turn, so that what disturbs the machine disturbs them all."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

__all__ = ["Sampler", "interleaved", "quiet", "ratios", "sampler", "summary"]

Sampler = Callable[[int], float]
"""Makes so many calls one after the other and returns the seconds that one took."""

SAMPLE = 2e-3
ROUNDS = 5


def sampler(call: Callable[[], object], clock: Callable[[], float] = time.perf_counter) -> Sampler:
    """Time a function in this process."""

    def sample(calls: int) -> float:
        started = clock()
        for _ in range(calls):
            call()
        return (clock() - started) / calls

    return sample


@contextmanager
def quiet() -> Iterator[None]:
    """Keep the garbage collector from running."""
    was = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


def _calls(sample: Sampler) -> int:
    """How many calls make a sample long enough for the clock; the calls made to find out warm it up."""
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
) -> dict[str, list[float]]:
    """Seconds a call of each, one sample a round, until the time is used up, and at least so many rounds.

    Within a round they follow each other; every other round has them in the opposite order.
    """
    times: dict[str, list[float]] = {name: [] for name in samplers}
    with quiet():
        calls = {name: _calls(sample) for name, sample in samplers.items()}
        end, done = clock() + seconds, 0
        while done < rounds or clock() < end:
            for name in list(samplers)[:: -1 if done % 2 else 1]:
                times[name].append(samplers[name](calls[name]))
            done += 1
    return times


def ratios(above: list[float], below: list[float]) -> list[float]:
    """The ratio in each round."""
    return [a / b for a, b in zip(above, below, strict=True)]


def summary(values: list[float]) -> dict[str, float]:
    """Median and quartiles."""
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": median, "low": low, "high": high}
