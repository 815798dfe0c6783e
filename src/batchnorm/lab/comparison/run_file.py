"""run.json: all that a comparison found. It is written as training goes on, and read to resume or to draw a report."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, fields
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, get_type_hints

import torch

from batchnorm.errors import RunError
from batchnorm.lab.comparison.folders import FILE, check_run_folder
from batchnorm.lab.comparison.request import Request
from batchnorm.lab.comparison.result import Result
from batchnorm.lab.data.dataset import DataDescription
from batchnorm.lab.files import write_file
from batchnorm.lab.json_records import from_json, to_json
from batchnorm.lab.machine import machine
from batchnorm.lab.training.runs import Run
from batchnorm.lab.training.settings import Arm, Settings
from batchnorm.version import __version__

__all__ = ["RunFile", "TrainedStack", "read_run"]

FORMAT = "batchnorm-run"
VERSION = 2
PACKAGES = ("torch", "numpy", "scipy", "scikit-learn", "polars", "plotly", "joblib")

HEAD = ("status", "created", "seconds", "versions", "machine", "command", "request", "settings", "data")

Status = Literal["running", "interrupted", "complete"]


@dataclass(frozen=True)
class TrainedStack:
    """A finished stack: runs of one arm that were trained together.

    Attributes
    ----------
    key : str
        Its name in the plan, "PHASE/ARM/NUMBER" with a short name of the phase.
    phase : str
        What it was trained for: "search", "confirm", "variant: ...", or a phase of a claim.
    arm : Arm
    seconds : float
    runs : list of Run
    """

    key: str
    phase: str
    arm: Arm
    seconds: float
    runs: list[Run]

    @property
    def order(self) -> tuple[str, int]:
        """Its place in the plan among the stacks of its phase."""
        name, _, number = self.key.rpartition("/")
        return name, int(number)


@dataclass
class RunFile:
    """The content of run.json in a folder, and how it is saved.

    Attributes
    ----------
    folder : Path
    command : str
        The command or the call, as it would be typed.
    request : Request
        The data and the claims asked for.
    settings : Settings
    data : DataDescription
    versions, machine : dict of str
        Versions of the packages, and a description of the machine.
    created : str
        Time at which the run began.
    status : "running", "interrupted" or "complete"
    seconds : float or None
        Time spent on the run; None until it first stops.
    stacks : list of TrainedStack
        The finished stacks, in the order in which they finished. A finished stack must not be changed.
    result : Result or None
        None until the search is finished.
    extension : dict
        What an `Extension` added to the result, as JSON; its own module reads it.
    """

    folder: Path
    command: str
    request: Request
    settings: Settings
    data: DataDescription
    versions: dict[str, str]
    machine: dict[str, str | int | None]
    created: str
    status: Status = "running"
    seconds: float | None = None
    stacks: list[TrainedStack] = field(default_factory=list)
    result: Result | None = None
    extension: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._written: dict[str, str] = {}  # JSON of each stack: a study has many, and saves after each

    @classmethod
    def create(
        cls,
        folder: Path,
        data: DataDescription,
        settings: Settings,
        *,
        request: Request | None = None,
        command: str = "",
    ) -> RunFile:
        """Return a new run in an empty folder."""
        versions = {"batchnorm": __version__} | {name: metadata.version(name) for name in PACKAGES}
        return cls(
            folder,
            command=command,
            request=request or Request(),
            settings=settings,
            data=data,
            versions=versions | {"torch": str(torch.__version__)},
            machine=machine(),
            created=datetime.now(UTC).isoformat(timespec="seconds"),
        )

    def runs(self, phase: str, arm: str | None = None) -> list[Run]:
        """Return the finished runs of a phase, in the order of the plan."""
        stacks = [stack for stack in self.stacks if stack.phase == phase and arm in (None, stack.arm)]
        return [run for stack in sorted(stacks, key=lambda stack: stack.order) for run in stack.runs]

    @property
    def result_json(self) -> dict[str, Any] | None:
        """The result and what an extension added to it, as run.json has them."""
        return None if self.result is None else to_json(self.result) | self.extension

    @property
    def _head(self) -> dict[str, Any]:
        """The members of run.json before its stacks and its result."""
        return {"format": FORMAT, "version": VERSION} | {name: to_json(getattr(self, name)) for name in HEAD}

    def save(self) -> None:
        """Write run.json, whole or not at all."""
        for stack in self.stacks:
            if stack.key not in self._written:
                self._written[stack.key] = _text(to_json(stack))
        members = {name: _text(value) for name, value in self._head.items()}
        members["stacks"] = f"[{','.join(self._written[stack.key] for stack in self.stacks)}]"
        members["result"] = _text(self.result_json)
        write_file(self.folder / FILE, "{" + ",".join(f'"{name}":{text}' for name, text in members.items()) + "}")


def _text(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"), allow_nan=False)


def read_run(folder: Path) -> RunFile:
    """Return the run of a folder.

    Raises
    ------
    RunError
        The folder has no run.json, or one that this version can't read.
    """
    check_run_folder(folder)
    path = folder / FILE
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RunError(f"{FILE} must be as batchnorm wrote it; {str(path)!r} can't be read: {error}") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise RunError(f"{FILE} must be as batchnorm wrote it; {str(path)!r} is something else")
    if content.get("version") != VERSION:
        raise RunError(
            f"{FILE} must be of format version {VERSION}; {str(path)!r} is of version {content.get('version')!r}, "
            "which another release of batchnorm reads: run the comparison again, or install that release"
        )
    missing = [name for name in (*HEAD, "stacks", "result") if name not in content]
    if missing:
        raise RunError(f"{FILE} must be as batchnorm wrote it; {str(path)!r} lacks {', '.join(missing)}")
    try:
        return _run_file(folder, content)
    except (TypeError, ValueError) as error:
        raise RunError(f"{FILE} must be as batchnorm wrote it; {str(path)!r} can't be read: {error}") from error


def _run_file(folder: Path, content: dict[str, Any]) -> RunFile:
    """Return the run that the content of a run.json describes."""
    hints = get_type_hints(RunFile)
    head = {name: from_json(hints[name], content[name]) for name in HEAD}
    run = RunFile(folder, **head, stacks=from_json(list[TrainedStack], content["stacks"]))
    if content["result"] is not None:
        own = {item.name for item in fields(Result)}
        values = content["result"]
        run.result = from_json(Result, {name: value for name, value in values.items() if name in own})
        run.extension = {name: value for name, value in values.items() if name not in own}
    return run
