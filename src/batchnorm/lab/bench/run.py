"""A run of the benchmark: it measures case after case, and writes the results as they come."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from batchnorm.kernels.allocator import tune_allocator
from batchnorm.lab.bench.measure import measure_allocators, measure_kernel
from batchnorm.lab.bench.models import measure_model
from batchnorm.lab.bench.registry import AnyCase, ModelCase
from batchnorm.lab.bench.request import BenchKind, BenchSettings
from batchnorm.lab.bench.results import BenchRun, CaseResult
from batchnorm.lab.bench.results_file import write
from batchnorm.lab.bench.timing import Tick
from batchnorm.lab.machine import describe, last_level_cache

__all__ = ["perform", "start"]


def start(kind: BenchKind, settings: BenchSettings, command: str) -> BenchRun:
    """Return a run without results, and set this process's allocator and threads as the settings say."""
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    if kind == "kernels":
        allocator = "tuned" if settings.tuned_allocator and tune_allocator() else "as it is"
    else:
        allocator = "tuned and as it is"
    return BenchRun(kind, command, settings, describe(allocator=allocator))


def perform(
    run: BenchRun,
    cases: Sequence[AnyCase],
    out: Path | None,
    say: Callable[[str], None],
    tick: Tick | None = None,
) -> None:
    """Measure the cases, and add their results to the run; an interrupt keeps what is measured.

    Parameters
    ----------
    run : BenchRun
    cases : sequence of AnyCase
    out : Path, optional
        File to write after every case.
    say : function of str
        Called with the name of each case before it is measured.
    tick : function of float, optional
        Called with the share of the current case that is done.
    """
    try:
        for case in cases:
            say(case.name)
            run.results.append(_measure(run, case, tick))
            if out is not None:
                write(run, out)
        run.complete = True
    finally:
        if out is not None:
            write(run, out)


def _measure(run: BenchRun, case: AnyCase, tick: Tick | None) -> CaseResult:
    if isinstance(case, ModelCase):
        return measure_model(case, run.settings, tick)
    if run.kind == "allocators":
        return measure_allocators(case, run.settings, tick)
    return measure_kernel(case, run.settings, last_level_cache(), tick)
