"""Atomic writing of files, and values that JSON can hold."""

from __future__ import annotations

import math
import os
import tempfile
from pathlib import Path
from typing import Any

from batchnorm.errors import RunError

__all__ = ["json_safe", "write_file"]


def write_file(path: Path, text: str) -> None:
    """Write a file atomically: either the whole text arrives or the previous file stays as it is."""
    part = None
    try:
        with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".part", delete=False, encoding="utf-8") as part:
            part.write(text)
            part.flush()
            os.fsync(part.fileno())
        Path(part.name).chmod(0o666 & ~_umask())
        Path(part.name).replace(path)
    except BaseException as error:  # Ctrl-C too must leave no litter
        if part is not None:
            Path(part.name).unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise RunError(f"{str(path)!r} must be writable, with disk to spare: {error.strerror}") from error
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def json_safe(value: Any) -> Any:
    """Return the value with numbers that JSON lacks replaced: NaN by None, infinities by "inf" and "-inf"."""
    if isinstance(value, dict):
        return {key: json_safe(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [json_safe(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else f"{value}"
    return value
