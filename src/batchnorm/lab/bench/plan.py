"""What a request on the command line measures."""

from __future__ import annotations

import re
from pathlib import Path

from batchnorm.errors import InputError
from batchnorm.lab.bench.models import LAYOUTS, MODELS, model_job, network
from batchnorm.lab.bench.registry import CASES, QUICK
from batchnorm.lab.bench.run import Job, Settings, allocator_job, kernel_job

__all__ = ["check_request", "plan", "select"]

MAPPED_ANEW = 32 * 2**20
"""Bytes from which glibc gives back what is freed, whatever it was asked for before."""


def check_request(given: dict[str, bool], out: Path | None) -> str:
    """The kind of what the options ask for.

    Raises
    ------
    InputError
        Options that go ill together, or no folder to write the results to.
    """
    names = [name for name, wanted in given.items() if wanted]
    if len(names) > 1 and names[0] in ("--allocators", "--models"):
        raise InputError(f"{names[0]} has sides and cases of its own; got {names[1]} too")
    if out is not None and (out.is_dir() or not out.absolute().parent.is_dir()):
        raise InputError(f"--out must be a file in a folder that exists; got {str(out)!r}")
    return names[0].removeprefix("--") if names and names[0] in ("--allocators", "--models") else "kernels"


def select(jobs: list[Job], pattern: str | None) -> list[Job]:
    """The jobs whose name contains the text, or else matches the regular expression somewhere.

    Raises
    ------
    InputError
        None does.
    """
    if pattern is None:
        return jobs
    chosen = [job for job in jobs if pattern in job.name]
    if not chosen:
        try:
            chosen = [job for job in jobs if re.search(pattern, job.name)]
        except re.error as error:
            raise InputError(f"--only must be a text or a regular expression; got {pattern!r}: {error}") from error
    if not chosen:
        raise InputError(f"--only must fit a case's name, such as {jobs[0].name}; got {pattern!r}")
    return chosen


def plan(kind: str, settings: Settings, *, only: str | None = None, quick: bool = False, batch: int = 16) -> list[Job]:
    """The jobs of the kind "kernels", "allocators" or "models"."""
    if kind == "models":
        network("mobilenetv2")  # says at once that transformers is missing
        return select([model_job(model, layout, batch, settings) for model in MODELS for layout in LAYOUTS], only)
    if kind == "allocators":
        large = [case for case in CASES if case.name.startswith("bn+relu/train/float32") and case.bytes > MAPPED_ANEW]
        return select([allocator_job(case, settings) for case in large], only)
    return select([kernel_job(case, settings) for case in (QUICK if quick else CASES)], only)
