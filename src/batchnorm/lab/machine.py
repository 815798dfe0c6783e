"""Description of the machine, as far as measured times depend on it; it names no machine, user or folder."""

from __future__ import annotations

import os
import platform
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from batchnorm.diagnostics.doctor import processor_name
from batchnorm.kernels.chosen import kernels
from batchnorm.version import __version__

__all__ = ["Machine", "caches", "describe", "last_level_cache", "machine"]

CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
UNITS = {"K": 2**10, "M": 2**20, "G": 2**30}
ASSUMED_CACHE = 32 * 2**20


@dataclass(frozen=True)
class Machine:
    """The machine, its load, the versions, and the kernels and the allocator in use.

    Attributes
    ----------
    system, processor : str
        Operating system and processor.
    cores : int or None
        Cores that this process may use.
    python, libc, torch, batchnorm : str
        Versions.
    threads : int
        Number of torch's threads.
    caches : dict of int
        Bytes of the data caches of a core, by level.
    memory : int or None
        Bytes of memory.
    load : float or None
        Load average of the last minute.
    torch_instructions : str
        Vector instructions that torch uses.
    kernels : str
        Kernels for CPU tensors.
    allocator : str
        Setting of glibc's allocator.
    """

    system: str
    processor: str
    cores: int | None
    python: str
    libc: str
    threads: int
    caches: dict[str, int]
    memory: int | None
    load: float | None
    torch: str
    torch_instructions: str
    batchnorm: str
    kernels: str
    allocator: str


def machine() -> dict[str, str | int | None]:
    """Describe the machine briefly: system, processor, cores and version of Python."""
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "processor": processor_name() or platform.processor(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
    }


def caches() -> dict[str, int]:
    """Return the bytes of the first core's data caches, such as ``{"L1": 32768}``; empty if the system doesn't tell."""
    found = {}
    for index in sorted(CACHES.glob("index*")):
        with suppress(OSError):
            level, kind, size = ((index / name).read_text().strip() for name in ("level", "type", "size"))
            if kind != "Instruction":
                found[f"L{level}"] = int(size[:-1]) * UNITS[size[-1]]
    return found


def last_level_cache() -> int:
    """Return the bytes of the largest cache, or 32 MiB if the system doesn't tell."""
    return max(caches().values(), default=ASSUMED_CACHE)


def _memory() -> int | None:
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # not POSIX
        return None


def _system() -> str:
    try:
        return platform.freedesktop_os_release()["PRETTY_NAME"]
    except (OSError, KeyError):
        return platform.system()


def _kernels() -> str:
    """Name the kernels for CPU tensors, without the reason why they are not native: it could contain a folder."""
    cpu = kernels().cpu
    return cpu.name if cpu.instructions is None else f"{cpu.name} ({cpu.instructions})"


def describe(*, allocator: str) -> Machine:
    """Describe the machine in full; ``allocator`` is the setting of glibc's allocator."""
    return Machine(
        system=f"{_system()}, {platform.machine()}",
        processor=processor_name() or platform.processor(),
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        python=platform.python_version(),
        libc=" ".join(platform.libc_ver()),
        threads=torch.get_num_threads(),
        caches=caches(),
        memory=_memory(),
        load=os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        torch=str(torch.__version__),
        torch_instructions=torch.backends.cpu.get_cpu_capability(),
        batchnorm=__version__,
        kernels=_kernels(),
        allocator=allocator,
    )
