"""The results file of ``batchnorm bench``, in JSON."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from batchnorm.errors import RunError
from batchnorm.lab.bench.registry import AnyCase, Case, ModelCase
from batchnorm.lab.bench.request import BenchSettings
from batchnorm.lab.bench.results import BenchRun, CaseResult, Copies, KernelTiming, ModelTiming, Share, Timing
from batchnorm.lab.bench.timing import Quartiles
from batchnorm.lab.files import write_file
from batchnorm.lab.machine import Machine

__all__ = ["json_text", "read", "write"]

FORMAT = "batchnorm-bench"
VERSION = 1
SPEEDUPS = {
    "speedup": "times_faster",
    "speedup_over_compiled": "times_faster_than_compiled",
    "speedup_over_untuned": "times_faster_than_untuned",
}
"""Keys of the speed-ups in the file."""


def write(run: BenchRun, out: Path) -> None:
    """Write the file atomically."""
    write_file(out, json_text(run) + "\n")


def json_text(run: BenchRun) -> str:
    """Return the content of the file."""
    return json.dumps(_to_json(run), indent=1, allow_nan=False)


def read(table: Path) -> BenchRun:
    """Read a results file.

    Raises
    ------
    RunError
        There is no such file, or it is not a results file of the benchmark.
    """
    try:
        content = json.loads(table.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RunError(f"table must be a results file of batchnorm bench; {str(table)!r}: {error}") from error
    if not isinstance(content, dict) or (content.get("format"), content.get("version")) != (FORMAT, VERSION):
        raise RunError(f"table must be a results file of batchnorm bench; {str(table)!r} is another file")
    return _from_json(content)


def _to_json(run: BenchRun) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "version": VERSION,
        "kind": run.kind,
        "command": run.command,
        "complete": run.complete,
        "settings": asdict(run.settings),
        "machine": asdict(run.machine),
        "results": [_result_to_json(result) for result in run.results],
    }


def _result_to_json(result: CaseResult) -> dict[str, Any]:
    case, timing = result.case, result.timing
    content = {"name": case.name, **asdict(case)}
    if isinstance(case, Case):
        content |= {"shape": list(case.shape), "bytes": case.bytes}
    content["fault"] = result.fault
    if timing is None:
        return content
    if isinstance(timing, ModelTiming):
        content["share"] = asdict(timing.share)
    content |= {
        "rounds": timing.rounds,
        "microseconds": {side: asdict(times) for side, times in timing.microseconds.items()},
    }
    if timing.processor_share is not None:
        content["processor_share"] = timing.processor_share
    for name, key in SPEEDUPS.items():
        if (speedup := getattr(timing, name)) is not None:
            content[key] = asdict(speedup)
    if isinstance(timing, KernelTiming):
        content |= {"copies": asdict(timing.copies), "gigabytes_per_second": timing.gigabytes_per_second}
    return content


def _from_json(content: dict[str, Any]) -> BenchRun:
    return BenchRun(
        kind=content["kind"],
        command=content["command"],
        settings=BenchSettings(**content["settings"]),
        machine=Machine(**content["machine"]),
        results=[_result_from_json(values) for values in content["results"]],
        complete=content["complete"],
    )


def _result_from_json(values: dict[str, Any]) -> CaseResult:
    case: AnyCase
    if "model" in values:
        case = ModelCase(values["model"], values["layout"], values["batch"])
    else:
        case = Case(values["operation"], values["mode"], values["dtype"], tuple(values["shape"]), values["layout"])
    return CaseResult(case, None if values["fault"] else _timing_from_json(values), values["fault"])


def _timing_from_json(values: dict[str, Any]) -> Timing:
    common: dict[str, Any] = {
        "rounds": values["rounds"],
        "microseconds": {side: Quartiles(**times) for side, times in values["microseconds"].items()},
        "processor_share": values.get("processor_share"),
    }
    common |= {name: Quartiles(**values[key]) for name, key in SPEEDUPS.items() if key in values}
    if "copies" in values:
        copies = Copies(**values["copies"])
        return KernelTiming(**common, copies=copies, gigabytes_per_second=values["gigabytes_per_second"])
    if "share" in values:
        return ModelTiming(**common, share=Share(**values["share"]))
    return Timing(**common)
