"""Starting and resuming a run whose data can be read again from what was asked for."""

from __future__ import annotations

from pathlib import Path

from batchnorm.errors import RunError
from batchnorm.lab.comparison.conduct import fit_to_data
from batchnorm.lab.comparison.folders import new_folder
from batchnorm.lab.comparison.request import Request
from batchnorm.lab.comparison.run_file import RunFile, read_run
from batchnorm.lab.data.dataset import Dataset
from batchnorm.lab.training.settings import Settings

__all__ = ["resume_run", "start_run"]


def start_run(
    request: Request, settings: Settings, *, out: Path | None = None, command: str = ""
) -> tuple[RunFile, Dataset]:
    """Return a new run in a folder of its own, and its data; a note names the settings that were changed.

    Raises
    ------
    DataError
        The data can't be used.
    RunError
        ``out`` is not empty, or can't be written to.
    """
    dataset = request.read(settings.seed)
    fitted, note = fit_to_data(settings, dataset)
    folder = new_folder(out, dataset.name)
    run = RunFile.create(folder, dataset.describe(note), fitted, request=request, command=command)
    return run, dataset


def resume_run(folder: Path) -> tuple[RunFile, Dataset]:
    """Return the unfinished run of a folder, and its data, which must be as they were.

    Raises
    ------
    RunError
        The folder has no run, the run is complete, or its data have changed.
    """
    run = read_run(folder)
    if run.status == "complete":
        raise RunError(f"resume must name the folder of an unfinished run; the run of {str(folder)!r} is complete")
    dataset = run.request.read(run.settings.seed)
    if dataset.fingerprint != run.data.sha256:
        raise RunError(f"resume needs the data as they were; {run.request.data!r} has changed")
    return run, dataset
