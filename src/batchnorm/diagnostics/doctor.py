"""Report of what batchnorm runs on: versions, processor, kernels, devices, allocator, environment."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch

from batchnorm.errors import KernelError
from batchnorm.kernels.allocator import tune_allocator
from batchnorm.kernels.chosen import REMEDY, VARIABLE, Kernels, kernels
from batchnorm.reports import Block, Entries, Report
from batchnorm.version import __version__

__all__ = ["Diagnosis", "doctor", "installed", "processor_name"]

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
TUNED = "glibc's; the command line makes it keep freed blocks; in a program, call batchnorm.tune_allocator()"
NOT_TUNED = "not glibc's: batchnorm.tune_allocator() changes nothing here"
UNSET = "none of the variables that matter is set"


@dataclass(frozen=True, repr=False)
class Diagnosis(Report):
    """The result of `doctor`.

    Attributes
    ----------
    versions : dict of str
        Of batchnorm, Python, torch and numpy.
    libraries : dict of (str or None)
        Version of each library that ``batchnorm[lab]`` requires; None where it is missing.
    system, processor : str
        Operating system and processor, as they name themselves.
    cores, threads : int
        Number of cores that this process may use, and of threads that torch uses.
    kernels : Kernels or None
        None where ``BATCHNORM_KERNELS`` names kernels that cannot run here.
    devices : list of str
        Torch's devices: the CPU and every accelerator.
    allocator_tuned : bool
        Whether `batchnorm.tune_allocator` could be applied.
    environment : dict of str
        The variables that are set and change any of this.
    problem : str or None
        Why the kernels named by ``BATCHNORM_KERNELS`` cannot run.
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

    def _summary(self) -> str:
        versions = ", ".join(f"{name} {self.versions[name]}" for name in ("batchnorm", "torch"))
        kernel = "a problem" if self.kernels is None else f"{self.kernels.cpu.name} kernels"
        return f"{versions}, {kernel}"

    def _records(self) -> list[dict[str, Any]]:
        return [{"item": label, "finding": text} for label, text in self._entries()]

    def _blocks(self) -> Iterable[Block]:
        yield Entries(self._entries())

    def _entries(self) -> list[tuple[str, str]]:
        present = ", ".join(f"{name} {version}" for name, version in self.libraries.items() if version)
        missing = ", ".join(name for name, version in self.libraries.items() if not version)
        return [
            ("Versions", ", ".join(f"{name} {version}" for name, version in self.versions.items())),
            ("Libraries", present or "none of the extra lab"),
            *([("Missing", f"{missing}: pip install 'batchnorm[lab]'")] if missing else []),
            ("System", self.system),
            ("Processor", self.processor),
            ("Threads", f"torch uses {self.threads}; this process may use {self.cores} cores"),
            *self._kernel_entries(),
            ("Devices", "; ".join(self.devices) if len(self.devices) > 1 else "cpu; torch finds no accelerator"),
            ("Allocator", TUNED if self.allocator_tuned else NOT_TUNED),
            ("Environment", ", ".join(f"{name}={value}" for name, value in self.environment.items()) or UNSET),
            *([("Problem", self.problem)] if self.problem else []),
        ]

    def _kernel_entries(self) -> list[tuple[str, str]]:
        if self.kernels is None:
            return []
        entries = [("CPU kernels", str(self.kernels.cpu)), ("CUDA kernels", str(self.kernels.cuda))]
        if self.kernels.cpu.name == "reference" and VARIABLE not in self.environment:
            entries.insert(1, ("", REMEDY))
        return entries


def doctor() -> Diagnosis:
    """Examine what batchnorm runs on in this process: versions, kernels, devices and settings.

    Like `tune_allocator`, it makes glibc keep freed blocks.

    Examples
    --------
    >>> import batchnorm as bn
    >>> print(bn.doctor())  # doctest: +ELLIPSIS
    Versions      batchnorm ..., Python ..., torch ..., numpy ...
    """
    found: Kernels | None = None
    problem = None
    try:
        found = kernels()
    except KernelError as error:
        problem = str(error)
    operating_system: Any = os
    affinity = getattr(operating_system, "sched_getaffinity", None)  # Linux has it
    return Diagnosis(
        versions={
            "batchnorm": __version__,
            "Python": platform.python_version(),
            "torch": torch.__version__,
            "numpy": np.__version__,
        },
        libraries=installed(_libraries_of_lab()),
        system=platform.platform(),
        processor=_processor_and_machine(),
        cores=len(affinity(0)) if affinity else os.cpu_count() or 1,
        threads=torch.get_num_threads(),
        kernels=found,
        devices=_devices(),
        allocator_tuned=tune_allocator(),
        environment={name: os.environ[name] for name in ENVIRONMENT if os.environ.get(name)},
        problem=problem,
    )


def installed(libraries: list[str]) -> dict[str, str | None]:
    """Return the version of each library; None where it is missing."""
    versions: dict[str, str | None] = {}
    for name in libraries:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    return versions


def _libraries_of_lab() -> list[str]:
    """Return the libraries that the extra ``lab`` requires, from the metadata of the package."""
    try:
        required = metadata.requires("batchnorm") or []
    except metadata.PackageNotFoundError:  # a checkout without an installation
        return []
    return [re.split(r"[^\w.-]", line)[0] for line in required if re.search(r"extra == .lab.", line)]


def processor_name() -> str | None:
    """Return the trade name of the processor; None where the system does not tell."""
    cpuinfo = Path("/proc/cpuinfo")
    named = re.search(r"^model name\s*:(.+)$", cpuinfo.read_text(), re.MULTILINE) if cpuinfo.exists() else None
    return named and named[1].strip()


def _processor_and_machine() -> str:
    name = processor_name()
    return f"{name} ({platform.machine()})" if name else platform.processor() or platform.machine()


def _devices() -> list[str]:
    """Return the names of the CPU and of every accelerator."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is None:
        return ["cpu"]
    if accelerator.type == "cuda":
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        return ["cpu", *(f"cuda:{i} {name}" for i, name in enumerate(names))]
    return ["cpu", accelerator.type]
