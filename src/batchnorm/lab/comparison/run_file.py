"""run.json: everything a comparison found, written as it goes, read again to resume it or to draw its report."""

from __future__ import annotations

import itertools
import json
import shutil
import tempfile
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from batchnorm.errors import RunError
from batchnorm.lab.files import json_safe, write_file
from batchnorm.lab.machine import machine
from batchnorm.lab.training.runs import Run
from batchnorm.version import __version__

__all__ = ["FILE", "RunFile", "new_folder", "read_run"]

FORMAT = "batchnorm-run"
VERSION = 1
FILE = "run.json"
KEYS = ("status", "command", "request", "settings", "data", "stacks", "result")
BYTES_NEEDED = 20_000_000
PACKAGES = ("torch", "numpy", "scipy", "scikit-learn", "polars", "plotly", "joblib")


def new_folder(out: Path | None, name: str) -> Path:
    """An empty folder for a run: the one asked for, or the next free ``batchnorm-runs/NAME-N``.

    Raises
    ------
    RunError
        The folder holds something, can't be made or written to, or the disk is nearly full.
    """
    if out is None:
        tried = (Path("batchnorm-runs") / f"{name}-{number}" for number in itertools.count(1))
        out = next(folder for folder in tried if not folder.exists())
    if out.exists() and not out.is_dir():
        raise RunError(f"--out must be a folder; {str(out)!r} is a file")
    if out.exists() and any(out.iterdir()):
        held = ", ".join(sorted(path.name for path in out.iterdir())[:3])
        hint = f"; --resume {out} goes on with it" if (out / FILE).exists() else ""
        raise RunError(f"--out must be a new or an empty folder; {str(out)!r} holds {held}{hint}")
    free = shutil.disk_usage(next(folder for folder in (out, *out.absolute().parents) if folder.exists())).free
    if free < BYTES_NEEDED:
        raise RunError(
            f"--out must have {BYTES_NEEDED // 1_000_000} MB of free disk; {str(out)!r} has {free / 1e6:.1f} MB"
        )
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass
    except OSError as error:
        raise RunError(f"--out must be a folder that can be written to; {str(out)!r}: {error.strerror}") from error
    return out


class RunFile:
    """The run.json of a folder: its content, and saving it."""

    def __init__(self, folder: Path, content: dict[str, Any]) -> None:
        self.folder = folder
        self.content = content
        self._stacks: dict[str, str] = {}  # as they are written: a study has many, and saves after each

    @classmethod
    def create(cls, folder: Path, **content: Any) -> RunFile:
        """A new run in an empty folder."""
        versions = {"batchnorm": __version__} | {name: metadata.version(name) for name in PACKAGES}
        head = {
            "format": FORMAT,
            "version": VERSION,
            "status": "running",
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "versions": versions | {"torch": str(torch.__version__)},
            "machine": machine(),
        }
        return cls(folder, head | content | {"stacks": [], "result": None})

    def runs(self, phase: str, arm: str | None = None) -> list[Run]:
        """The finished runs of a phase, in the order of the plan."""
        stacks = [s for s in self.content["stacks"] if s["phase"] == phase and arm in (None, s["arm"])]

        def place(stack: dict[str, Any]) -> tuple[str, int]:
            name, _, number = stack["key"].rpartition("/")
            return name, int(number)

        return [Run.from_json(values) for stack in sorted(stacks, key=place) for values in stack["runs"]]

    def save(self) -> None:
        """Write run.json, whole or not at all. A finished stack must not be changed any more."""
        for stack in self.content["stacks"]:
            if stack["key"] not in self._stacks:
                self._stacks[stack["key"]] = _json(stack)
        stacks = ",".join(self._stacks[stack["key"]] for stack in self.content["stacks"])
        members = [
            f"{_json(key)}:{f'[{stacks}]' if key == 'stacks' else _json(value)}" for key, value in self.content.items()
        ]
        write_file(self.folder / FILE, f"{{{','.join(members)}}}")


def _json(value: Any) -> str:
    return json.dumps(json_safe(value), separators=(",", ":"), allow_nan=False)


def read_run(folder: Path) -> RunFile:
    """The run of a folder.

    Raises
    ------
    RunError
        No run.json there, or one that this version can't read.
    """
    path = folder / FILE
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RunError(f"DIR must be the folder of a run, with a {FILE}; {str(folder)!r} has none") from None
    except (OSError, ValueError) as error:
        raise RunError(f"{FILE} must be as batchnorm wrote it; {str(path)!r} can't be read: {error}") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise RunError(f"{FILE} must be as batchnorm wrote it; {str(path)!r} is something else")
    if content.get("version") != VERSION:
        raise RunError(f"{FILE} must be of format version {VERSION}; {str(path)!r} is of {content.get('version')!r}")
    missing = [key for key in KEYS if key not in content]
    if missing:
        raise RunError(f"{FILE} must be as batchnorm wrote it; {str(path)!r} lacks {', '.join(missing)}")
    content["result"] = _with_infinities(content["result"])
    return RunFile(folder, content)


def _with_infinities(value: Any) -> Any:
    """The value with "inf" and "-inf" turned back into the numbers they stand for."""
    if isinstance(value, dict):
        return {key: _with_infinities(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_with_infinities(item) for item in value]
    return float(value) if value in ("inf", "-inf") else value
