"""Timing of a batch normalization: our layer, torch's, and a copy of x, once our result is known to be right."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch

from batchnorm.lab.bench import sides
from batchnorm.lab.bench.check import find_fault
from batchnorm.lab.bench.floors import floor, ideal_bytes
from batchnorm.lab.bench.processes import in_new_process
from batchnorm.lab.bench.processor import ProcessorTime
from batchnorm.lab.bench.registry import Case
from batchnorm.lab.bench.request import BenchSettings
from batchnorm.lab.bench.results import CaseResult, Copies, KernelTiming, Timing
from batchnorm.lab.bench.timing import Quartiles, Tick, interleaved, quartiles, ratios, sampler

__all__ = ["call_of", "measure_allocators", "measure_kernel", "time_across_allocators"]

MICRO = 1e6


def measure_kernel(case: Case, settings: BenchSettings, cache: int, tick: Tick | None = None) -> CaseResult:
    """Time a case in this process; ``cache`` is the size of the last-level cache in bytes."""
    given = sides.inputs(case)
    ours = sides.ours(case, given)
    fault = find_fault(case, given, ours)
    if fault is not None:
        return CaseResult(case, fault=fault)
    calls = {
        "ours": sides.timed_call(case, given, ours),
        "torch": sides.timed_call(case, given, sides.stock(case, given)),
        "copy": sides.copy(given),
    }
    if settings.compile and case.mode == "train" and case.dtype == "float32":
        calls["compiled"] = sides.timed_call(case, given, sides.stock(case, given, compiled=True))
    processor = ProcessorTime()
    samplers = {side: processor.watch(sampler(call)) for side, call in calls.items()}
    with torch.set_grad_enabled(case.mode == "train"):
        times = interleaved(samplers, settings.seconds, tick=tick)
    if "compiled" in calls:
        torch.compiler.reset()  # or the next shapes reach the limit of recompilations
    microseconds = _microseconds(times)
    return CaseResult(
        case,
        KernelTiming(
            rounds=len(times["ours"]),
            microseconds=microseconds,
            speedup=_speedup(times, "torch"),
            speedup_over_compiled=_speedup(times, "compiled") if "compiled" in times else None,
            processor_share=round(processor.share, 3),
            copies=Copies(
                ours=quartiles(ratios(times["ours"], times["copy"])).median,
                torch=quartiles(ratios(times["torch"], times["copy"])).median,
                floor=floor(case, cache),
            ),
            gigabytes_per_second=ideal_bytes(case, cache) / (microseconds["ours"].median / MICRO) / 1e9,
        ),
    )


def measure_allocators(case: Case, settings: BenchSettings, tick: Tick | None = None) -> CaseResult:
    """Time a case in new processes, with the allocator tuned and as it is."""
    given = sides.inputs(case)
    fault = find_fault(case, given, sides.ours(case, given))
    if fault is not None:
        return CaseResult(case, fault=fault)
    return CaseResult(case, time_across_allocators(call_of, case, seconds=settings.seconds, tick=tick))


def call_of(case: Case, side: str) -> Callable[[], object]:
    """Return the function that is timed for a side of a case, "ours" or "torch"."""
    given = sides.inputs(case)
    return sides.timed_call(case, given, (sides.ours if side == "ours" else sides.stock)(case, given))


def time_across_allocators(
    build: Callable[..., Callable[[], object]], *arguments: Any, seconds: float, tick: Tick | None = None
) -> Timing:
    """Time both sides with the allocator tuned, and torch also with it as it is, each in a process of its own.

    ``build(*arguments, side)`` returns the function to time, as `call_of` does.
    """
    processes = {"ours": ("ours", True), "torch": ("torch", True), "untuned": ("torch", False)}
    processor = ProcessorTime()
    with ExitStack() as stack:
        samplers = {
            name: stack.enter_context(in_new_process(build, *arguments, side, tuned=tuned, processor=processor))
            for name, (side, tuned) in processes.items()
        }
        times = interleaved(samplers, seconds, tick=tick)
    return Timing(
        rounds=len(times["ours"]),
        microseconds=_microseconds(times),
        speedup=_speedup(times, "torch"),
        speedup_over_untuned=_speedup(times, "untuned"),
        processor_share=round(processor.share, 3),
    )


def _microseconds(times: dict[str, list[float]]) -> dict[str, Quartiles]:
    return {side: quartiles([MICRO * seconds for seconds in values]) for side, values in times.items()}


def _speedup(times: dict[str, list[float]], side: str) -> Quartiles:
    return quartiles(ratios(times[side], times["ours"]))
