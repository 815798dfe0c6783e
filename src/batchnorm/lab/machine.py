"""Description of the machine, as far as measured times depend on it; no names of machines, users or folders."""

from __future__ import annotations

import os
import platform
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from batchnorm.kernels.chosen import kernels
from batchnorm.version import __version__

__all__ = ["caches", "describe", "last_level_cache", "machine"]

CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
UNITS = {"K": 2**10, "M": 2**20, "G": 2**30}
ASSUMED_CACHE = 32 * 2**20


def machine() -> dict[str, Any]:
    """Describe the machine as far as measured times depend on it; nothing names the machine or its user."""
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "processor": _processor(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
    }


def _processor() -> str:
    information = Path("/proc/cpuinfo")
    if information.exists():
        for line in information.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()


def caches() -> dict[str, int]:
    """Bytes of the first core's data caches, by level: ``{"L1": 32768, ...}``; empty where the system doesn't say."""
    found = {}
    for index in sorted(CACHES.glob("index*")):
        with suppress(OSError):
            level, kind, size = ((index / name).read_text().strip() for name in ("level", "type", "size"))
            if kind != "Instruction":
                found[f"L{level}"] = int(size[:-1]) * UNITS[size[-1]]
    return found


def last_level_cache() -> int:
    """Bytes of the largest cache; 32 MiB where the system doesn't say."""
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
    """The kernels of CPU tensors; a reason why they aren't native could name a folder, and is left out."""
    cpu = kernels().cpu
    return cpu.name if cpu.instructions is None else f"{cpu.name} ({cpu.instructions})"


def describe(*, allocator: str) -> dict[str, Any]:
    """The machine and how busy it is, the versions, the kernels and the setting of the allocator."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return machine() | {
        "system": f"{_system()}, {platform.machine()}",
        "libc": " ".join(platform.libc_ver()),
        "cores": cores,
        "threads": torch.get_num_threads(),
        "caches": caches(),
        "memory": _memory(),
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "torch": str(torch.__version__),
        "torch_instructions": torch.backends.cpu.get_cpu_capability(),
        "batchnorm": __version__,
        "kernels": _kernels(),
        "allocator": allocator,
    }
