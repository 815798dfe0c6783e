"""Measures what is asked for and keeps it in one dictionary, written to a file as it grows."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from batchnorm.errors import RunError
from batchnorm.kernels.allocator import tune_allocator
from batchnorm.lab.bench import sides
from batchnorm.lab.bench.check import fault
from batchnorm.lab.bench.floors import floor, ideal_bytes
from batchnorm.lab.bench.processes import elsewhere
from batchnorm.lab.bench.registry import Case
from batchnorm.lab.bench.timing import interleaved, ratios, sampler, summary
from batchnorm.lab.files import json_safe, write_file
from batchnorm.lab.machine import describe, last_level_cache

__all__ = ["FORMAT", "Job", "Settings", "allocator_job", "has_faults", "kernel_job", "perform", "read", "start"]

FORMAT = "batchnorm-bench"
VERSION = 1
MICRO = 1e6


@dataclass(frozen=True)
class Settings:
    """How it is measured: seconds a case, beside torch.compile too or not, with which allocator and threads."""

    seconds: float = 1.0
    compile: bool = False
    tuned_allocator: bool = True
    threads: int | None = None


@dataclass(frozen=True)
class Job:
    """Something to measure."""

    name: str
    measure: Callable[[], dict[str, Any]]


def _compared(times: dict[str, list[float]], against: dict[str, str]) -> dict[str, Any]:
    """Microseconds of each side, and how many times faster ours is: the median over the ratios of the rounds."""
    return {
        "rounds": len(times["ours"]),
        "microseconds": {name: summary([MICRO * seconds for seconds in of]) for name, of in times.items()},
        **{key: summary(ratios(times[side], times["ours"])) for key, side in against.items()},
    }


def _described(case: Case) -> dict[str, Any]:
    return {"name": case.name, **asdict(case), "shape": list(case.shape), "bytes": case.bytes}


def measure_case(case: Case, settings: Settings, cache: int) -> dict[str, Any]:
    """Ours, torch and a copy of x in turn, once ours is known to be right; "fault" says what is not."""
    result = _described(case)
    given = sides.inputs(case)
    ours = sides.ours(case, given)
    wrong = fault(case, given, ours)
    if wrong is not None:
        return result | {"fault": wrong}
    calls = {
        "ours": sides.timed_call(case, given, ours),
        "torch": sides.timed_call(case, given, sides.stock(case, given)),
        "copy": sides.copy(given),
    }
    against = {"times_faster": "torch"}
    if settings.compile and case.mode == "train" and case.dtype == "float32":
        calls["compiled"] = sides.timed_call(case, given, sides.stock(case, given, compiled=True))
        against["times_faster_than_compiled"] = "compiled"
    with torch.set_grad_enabled(case.mode == "train"):
        times = interleaved({name: sampler(call) for name, call in calls.items()}, settings.seconds)
    if "compiled" in calls:
        torch.compiler.reset()  # or the next shapes reach the limit of recompilations
    copies = {
        name: summary(ratios(of, times["copy"]))["median"] for name, of in times.items() if name in ("ours", "torch")
    }
    compared = _compared(times, against)
    seconds = compared["microseconds"]["ours"]["median"] / MICRO
    return {
        **result,
        "fault": None,
        **compared,
        "copies": copies | {"floor": floor(case, cache)},
        "gigabytes_per_second": ideal_bytes(case, cache) / seconds / 1e9,
    }


def kernel_job(case: Case, settings: Settings) -> Job:
    """Time a case."""
    return Job(case.name, lambda: measure_case(case, settings, last_level_cache()))


def call_of(case: Case, side: str) -> Callable[[], object]:
    """What is timed of a case's side, "ours" or "torch"."""
    given = sides.inputs(case)
    return sides.timed_call(case, given, (sides.ours if side == "ours" else sides.stock)(case, given))


def _measure_allocators(case: Case, settings: Settings) -> dict[str, Any]:
    result = _described(case)
    given = sides.inputs(case)
    wrong = fault(case, given, sides.ours(case, given))
    if wrong is not None:
        return result | {"fault": wrong}
    return result | {"fault": None} | across_allocators(call_of, case, seconds=settings.seconds)


def across_allocators(build: Callable[..., Callable[[], object]], *arguments: Any, seconds: float) -> dict[str, Any]:
    """Ours and torch with the allocator tuned, and torch with it as it is, in turn, each in a process of its own."""
    with ExitStack() as stack:
        samplers = {
            name: stack.enter_context(elsewhere(build, *arguments, side, tuned=tuned))
            for name, side, tuned in (("ours", "ours", True), ("torch", "torch", True), ("untuned", "torch", False))
        }
        times = interleaved(samplers, seconds)
    return _compared(times, {"times_faster": "torch", "times_faster_than_untuned": "untuned"})


def allocator_job(case: Case, settings: Settings) -> Job:
    """Time a case in processes whose allocator is tuned and is not."""
    return Job(case.name, lambda: _measure_allocators(case, settings))


def start(kind: str, settings: Settings, command: str) -> dict[str, Any]:
    """An empty result of the kind "kernels", "allocators" or "models"; sets this process's allocator and threads."""
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    if kind == "kernels":
        allocator = "tuned" if settings.tuned_allocator and tune_allocator() else "as it is"
    else:
        allocator = "tuned and as it is"
    return {
        "format": FORMAT,
        "version": VERSION,
        "kind": kind,
        "command": command,
        "complete": False,
        "settings": asdict(settings),
        "machine": describe(allocator=allocator),
        "results": [],
    }


def perform(content: dict[str, Any], jobs: Iterable[Job], out: Path | None, say: Callable[[str], None]) -> None:
    """Measure one after the other; Ctrl-C ends it, with what is measured kept."""
    try:
        for job in jobs:
            say(job.name)
            content["results"].append(job.measure())
            if out is not None:
                write(content, out)
        content["complete"] = True
    finally:
        if out is not None:
            write(content, out)


def write(content: dict[str, Any], out: Path) -> None:
    """Write the file, whole or not at all."""
    write_file(out, json.dumps(json_safe(content), indent=1, allow_nan=False) + "\n")


def read(path: Path) -> dict[str, Any]:
    """What a run has written.

    Raises
    ------
    RunError
        There is no such file, or it is something else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RunError(f"--table must name a file that bench has written; {str(path)!r}: {error}") from error
    if not isinstance(content, dict) or (content.get("format"), content.get("version")) != (FORMAT, VERSION):
        raise RunError(f"--table must name a file that bench has written; {str(path)!r} is something else")
    return content


def has_faults(content: dict[str, Any]) -> bool:
    """Whether a result was wrong, and so not timed."""
    return any(result["fault"] for result in content["results"])
