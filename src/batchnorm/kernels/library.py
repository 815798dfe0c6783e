"""The compiled library of native.cpp: loads it, lends it torch's threads, and says why there is none."""

from __future__ import annotations

import ctypes
import functools
import os
from dataclasses import dataclass
from pathlib import Path

import torch

__all__ = ["ABI", "Library", "instructions", "library", "low_address", "reason"]

ABI = 4
HERE = Path(__file__).parent


@dataclass(frozen=True)
class Library:
    """The loaded library, or the reason why there is none."""

    handle: ctypes.CDLL | None
    reason: str | None


@functools.cache
def library() -> Library:
    """Load the library at the first call."""
    path = Path(os.environ.get("BATCHNORM_NATIVE_LIBRARY") or HERE / "_native.so")
    if not path.is_file():
        note = HERE / "_native.txt"
        return Library(None, note.read_text().strip() if note.is_file() else f"{path.name} is not there")
    try:
        handle = ctypes.CDLL(str(path))
    except OSError as error:
        return Library(None, f"{path.name} can't be loaded: {error}")
    if handle.bn_abi() != ABI:
        return Library(None, f"{path.name} was built from other sources: version {handle.bn_abi()}, not {ABI}")
    handle.bn_instructions.restype = ctypes.c_char_p
    for function in (handle.bn_forward, handle.bn_backward):
        function.argtypes = [ctypes.c_char_p]
    threads = _torch_threads()
    if threads is None:
        return Library(None, f"torch {torch.__version__} lends no threads (torch_parallel_for needs torch 2.10)")
    handle.bn_use_threads(*threads)
    handle.bn_set_min_address.argtypes = [ctypes.c_int64]
    handle.bn_set_min_address(low_address())
    return Library(handle, None)


def low_address() -> int:
    """Return an address below which no tensor storage is expected."""
    return ctypes.addressof(ctypes.create_string_buffer(1 << 12)) // 2


def _torch_threads() -> tuple[ctypes.c_void_p, ctypes.c_void_p] | None:
    """Return torch's parallel_for and its count of threads, of its stable C interface torch/csrc/stable/c/shim.h."""
    for name in ("libtorch_cpu.so", "libtorch_cpu.dylib"):
        path = Path(torch.__file__).parent / "lib" / name
        if path.is_file():
            torch_library = ctypes.CDLL(str(path))
            try:
                found = torch_library.torch_parallel_for, torch_library.torch_get_num_threads
            except AttributeError:
                return None
            return ctypes.cast(found[0], ctypes.c_void_p), ctypes.cast(found[1], ctypes.c_void_p)
    return None


def reason() -> str | None:
    """Return why the native kernels can't be used, or None where they can."""
    return library().reason


def instructions() -> str:
    """Return the instruction set that the kernels use on this processor, such as AVX2."""
    handle = library().handle
    return "" if handle is None else handle.bn_instructions().decode()
