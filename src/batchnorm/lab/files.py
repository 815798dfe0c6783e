"""Atomic writing of files."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from batchnorm.errors import RunError

__all__ = ["write_file"]


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
