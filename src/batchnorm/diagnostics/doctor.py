"""What batchnorm runs on here: versions, processor, kernels, devices, allocator, environment."""

from __future__ import annotations

import json
import os
import platform
import re
import textwrap
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch

from batchnorm.errors import KernelError
from batchnorm.kernels.allocator import tune_allocator
from batchnorm.kernels.chosen import REMEDY, VARIABLE, Kernels, kernels
from batchnorm.version import __version__

__all__ = ["Findings", "examine", "installed"]

WIDTH = 80
LABEL = 14
ENVIRONMENT = (
    VARIABLE,
    "BATCHNORM_NATIVE_LIBRARY",
    "CUDA_VISIBLE_DEVICES",
    "GLIBC_TUNABLES",
    "LD_PRELOAD",
    "MALLOC_ARENA_MAX",
    "MALLOC_MMAP_THRESHOLD_",
    "MALLOC_TRIM_THRESHOLD_",
    "MKL_NUM_THREADS",
    "OMP_NUM_THREADS",
)


@dataclass(frozen=True)
class Findings:
    """What `examine` found; ``str()`` of it is a page of 80 columns.

    Attributes
    ----------
    versions : dict of str
        batchnorm, Python, torch and numpy.
    libraries : dict of (str or None)
        Version of each library that ``batchnorm[lab]`` asks for; None where it is missing.
    system, processor : str
        Operating system and processor, as they name themselves.
    cores, threads : int
        Cores that this process may use, and threads that torch does use.
    kernels : Kernels or None
        What runs; None where ``BATCHNORM_KERNELS`` asks for what can't be had.
    devices : list of str
        Torch's devices: the CPU and every accelerator.
    allocator_tuned : bool
        Whether `batchnorm.tune_allocator` could be applied.
    environment : dict of str
        The variables that change any of this and are set.
    problem : str or None
        What was asked for and can't be had.
    """

    versions: dict[str, str]
    libraries: dict[str, str | None]
    system: str
    processor: str
    cores: int
    threads: int
    kernels: Kernels | None
    devices: list[str]
    allocator_tuned: bool
    environment: dict[str, str]
    problem: str | None

    def to_json(self) -> str:
        """The same as JSON."""
        return json.dumps(asdict(self), indent=2)

    def __str__(self) -> str:
        there = ", ".join(f"{name} {version}" for name, version in self.libraries.items() if version)
        missing = ", ".join(name for name, version in self.libraries.items() if not version)
        rows = [
            ("Versions", ", ".join(f"{name} {version}" for name, version in self.versions.items())),
            ("Libraries", there or "none of the extra lab"),
            *([("Missing", f"{missing}: pip install 'batchnorm[lab]'")] if missing else []),
            ("System", self.system),
            ("Processor", self.processor),
            ("Threads", f"torch uses {self.threads}; this process may use {self.cores} cores"),
            *self._kernels(),
            ("Devices", "; ".join(self.devices) if len(self.devices) > 1 else "cpu; torch finds no accelerator"),
            ("Allocator", TUNED if self.allocator_tuned else NOT_TUNED),
            ("Environment", ", ".join(f"{name}={value}" for name, value in self.environment.items()) or UNSET),
            *([("Problem", self.problem)] if self.problem else []),
        ]
        return "\n".join(_row(label, text) for label, text in rows)

    def _kernels(self) -> list[tuple[str, str]]:
        if self.kernels is None:
            return []
        rows = [("CPU kernels", str(self.kernels.cpu)), ("CUDA kernels", str(self.kernels.cuda))]
        if self.kernels.cpu.name == "reference" and VARIABLE not in self.environment:
            rows.insert(1, ("", REMEDY))
        return rows


TUNED = (
    "glibc's; the command line lets it keep freed blocks, and so can a program of your own: batchnorm.tune_allocator()"
)
NOT_TUNED = "not glibc's: batchnorm.tune_allocator() changes nothing here"
UNSET = "none of the variables that matter is set"


def _row(label: str, text: str) -> str:
    indent = " " * LABEL
    return textwrap.fill(
        text, WIDTH, initial_indent=label.ljust(LABEL), subsequent_indent=indent, break_on_hyphens=False
    )


def installed(libraries: list[str]) -> dict[str, str | None]:
    """The version of each library; None where it is missing."""
    versions: dict[str, str | None] = {}
    for name in libraries:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    return versions


def _libraries_of_lab() -> list[str]:
    """What the extra ``lab`` names, by the package's own metadata."""
    try:
        required = metadata.requires("batchnorm") or []
    except metadata.PackageNotFoundError:  # a checkout that pip has not installed
        return []
    return [re.split(r"[^\w.-]", line)[0] for line in required if re.search(r"extra == .lab.", line)]


def _processor() -> str:
    """The processor by its trade name, where the system tells it."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        named = re.search(r"^model name\s*: (.+)$", cpuinfo.read_text(), re.MULTILINE)
        if named:
            return f"{named[1]} ({platform.machine()})"
    return platform.processor() or platform.machine()


def _devices() -> list[str]:
    """The CPU and every accelerator, by name."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is None:
        return ["cpu"]
    if accelerator.type == "cuda":
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        return ["cpu", *(f"cuda:{i} {name}" for i, name in enumerate(names))]
    return ["cpu", accelerator.type]


def examine() -> Findings:
    """Look at what batchnorm runs on in this process, whose allocator it tunes."""
    runs: Kernels | None = None
    problem = None
    try:
        runs = kernels()
    except KernelError as error:
        problem = str(error)
    own: Any = os
    cores = len(own.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return Findings(
        versions={
            "batchnorm": __version__,
            "Python": platform.python_version(),
            "torch": torch.__version__,
            "numpy": np.__version__,
        },
        libraries=installed(_libraries_of_lab()),
        system=platform.platform(),
        processor=_processor(),
        cores=cores,
        threads=torch.get_num_threads(),
        kernels=runs,
        devices=_devices(),
        allocator_tuned=tune_allocator(),
        environment={name: os.environ[name] for name in ENVIRONMENT if os.environ.get(name)},
        problem=problem,
    )
