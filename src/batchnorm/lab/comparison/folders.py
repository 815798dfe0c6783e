"""Folders of runs. Importing this file does not load torch, so that the command line can check folders early."""

from __future__ import annotations

import itertools
import shutil
import tempfile
from pathlib import Path

from batchnorm.errors import RunError

__all__ = ["FILE", "check_empty", "check_run_folder", "new_folder"]

FILE = "run.json"
BYTES_NEEDED = 20_000_000


def new_folder(out: Path | None, name: str) -> Path:
    """Return an empty folder for a run: ``out``, or the next free ``batchnorm-runs/NAME-N``.

    Raises
    ------
    RunError
        The folder is not empty, can't be made or written to, or the disk is nearly full.
    """
    if out is None:
        tried = (Path("batchnorm-runs") / f"{name}-{number}" for number in itertools.count(1))
        out = next(folder for folder in tried if not folder.exists())
    check_empty(out)
    free = shutil.disk_usage(next(folder for folder in (out, *out.absolute().parents) if folder.exists())).free
    if free < BYTES_NEEDED:
        raise RunError(
            f"out must have {BYTES_NEEDED // 1_000_000} MB of free disk; {str(out)!r} has {free / 1e6:.1f} MB"
        )
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass
    except OSError as error:
        raise RunError(f"out must be a writable folder; {str(out)!r}: {error.strerror}") from error
    return out


def check_empty(out: Path) -> None:
    """Raise `RunError` unless the path is free or an empty folder."""
    if out.exists() and not out.is_dir():
        raise RunError(f"out must be a folder; {str(out)!r} is a file")
    if out.exists() and any(out.iterdir()):
        names = ", ".join(sorted(path.name for path in out.iterdir())[:3])
        raise RunError(f"out must be a new or an empty folder; {str(out)!r} contains {names}")


def check_run_folder(folder: Path, parameter: str = "folder") -> None:
    """Raise `RunError`, which names the parameter, unless the folder has a run.json."""
    if not (folder / FILE).is_file():
        raise RunError(f"{parameter} must be the folder of a run, with a {FILE}; {str(folder)!r} has none")
