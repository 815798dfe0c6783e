"""The comparison and the study from Python: arrays or a data frame in, a report out."""

from __future__ import annotations

import shutil
import tempfile
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from joblib import cpu_count

from batchnorm.errors import InputError
from batchnorm.lab.claims import CLAIMS, ClaimTests
from batchnorm.lab.comparison.conduct import compare as run_comparison
from batchnorm.lab.comparison.conduct import fit_to_data
from batchnorm.lab.comparison.folders import new_folder
from batchnorm.lab.comparison.request import Request
from batchnorm.lab.comparison.run_file import RunFile
from batchnorm.lab.data.arrays import table_from_arrays
from batchnorm.lab.data.dataset import Task, prepare
from batchnorm.lab.data.reading import DateOrder
from batchnorm.lab.report import terminal
from batchnorm.lab.report.comparison import Comparison
from batchnorm.lab.training.settings import Settings

__all__ = ["Comparison", "compare", "study"]


def compare(
    X: Any,
    y: Any,
    *,
    name: str = "data",
    task: Task | None = None,
    numeric: str | Sequence[str] = (),
    categorical: str | Sequence[str] = (),
    claims: Sequence[str] = (),
    missing: str | Sequence[str] = (),
    dates: DateOrder | None = None,
    jobs: int | None = None,
    out: str | Path | None = None,
    progress: bool = False,
    **settings: Any,
) -> Comparison:
    """Train a network without batch norm, with it before and with it after the nonlinearity, and compare.

    The command ``batchnorm compare`` does the same; docs/compare.md describes the method.

    Parameters
    ----------
    X : array or data frame, shape (rows, columns)
        Features: numbers, texts, booleans or dates; missing values are filled in.
    y : array, shape (rows,), or str
        Target, or the name of the column of X that is the target.
    name : str
        Name of the data in the report.
    task : "classification" or "regression", optional
        By default inferred: text, and whole numbers of at most 20 values, are classes.
    numeric, categorical : str or sequences of str
        Columns to take as numbers or as categories, whatever their values look like.
    missing : str or sequence of str
        Further texts that stand for a missing value; docs/compare.md lists those that are known.
    dates : "day-first" or "month-first", optional
        Order of texts such as 03/04/2020; by default that which the other dates show, else day first.
    claims : sequence of str
        Claims to measure as well, such as "stability"; docs/compare.md lists them.
    jobs : int, optional
        Number of processes, each of one thread; by default one per core.
    out : path, optional
        New or empty folder for run.json; by default a temporary one.
    progress : bool
        Show a progress bar on stderr.
    **settings
        Fields of `Settings`: hidden, activation, batch_size, optimizer, learning_rates,
        search_seeds, seeds, steps, init, init_scale, inputs, target_score, seed.

    Returns
    -------
    Comparison
        The report, with ``frame()``, ``verdicts()``, ``figures`` and ``to_html()``; ``result.notes`` says how the cells
        of the data were read.

    Raises
    ------
    DataError
        The data can't be used.
    InputError
        A setting or a claim is unknown, or a setting has a wrong value.
    RunError
        ``out`` is not empty, or can't be written to.

    Examples
    --------
    >>> import batchnorm as bn
    >>> from sklearn.datasets import load_wine
    >>> found = bn.lab.compare(*load_wine(return_X_y=True), hidden=(8,), steps=30, seeds=2, search_seeds=1, jobs=1)
    >>> found.frame()["batch_norm"].to_list()
    ['none', 'before', 'after']
    """
    known = {field.name for field in fields(Settings)}
    unknown = [setting for setting in settings if setting not in known]
    if unknown:
        raise InputError(f"a setting must be one of {', '.join(sorted(known))}; got {unknown[0]!r}")
    tests = ClaimTests(claims)
    given = Settings(**settings)
    request = Request(
        task=task,
        numeric=_listed(numeric),
        categorical=_listed(categorical),
        claims=tests.names,
        missing=_listed(missing),
        dates=dates,
    )
    table = table_from_arrays(X, y, name, request.reading)
    dataset = prepare(table, task=task, numeric=request.numeric, categorical=request.categorical, seed=given.seed)
    fitted, note = fit_to_data(given, dataset)
    run = RunFile.create(
        Path(tempfile.mkdtemp(prefix="batchnorm-")) if out is None else new_folder(Path(out), name),
        dataset.describe(note),
        fitted,
        request=request,
        command=_call(request, name, settings),
    )
    if out is None:
        weakref.finalize(run, shutil.rmtree, run.folder, ignore_errors=True)
    with terminal.Bars() if progress else terminal.Silence() as shown:
        run_comparison(dataset, run, jobs=jobs or cpu_count(), progress=shown, extension=tests if claims else None)
    return Comparison.of(run)


def _listed(texts: str | Sequence[str]) -> list[str]:
    return [texts] if isinstance(texts, str) else list(texts)


def _call(request: Request, name: str, settings: Mapping[str, Any]) -> str:
    """Return the call with the options that were given and its settings, for the report."""
    function = "study" if list(request.claims) == list(CLAIMS) else "compare"
    names = ["task", "numeric", "categorical", "missing", "dates", *(["claims"] if function == "compare" else [])]
    given = [] if name == "data" else [("name", name)]
    given += [(option, getattr(request, option)) for option in names if getattr(request, option)]
    given += settings.items()
    return f"bn.lab.{function}({', '.join(['X', 'y', *(f'{name}={value!r}' for name, value in given)])})"


def study(X: Any, y: Any, **options: Any) -> Comparison:
    """Compare as `compare` does, and measure every claim about batch normalization; takes the options of `compare`.

    Examples
    --------
    ``bn.lab.study(X, y).verdicts()`` is a Polars frame with a row per finding.
    """
    if "claims" in options:
        raise InputError(
            f"study measures every claim; got claims={options['claims']!r}: to measure some of them, call compare"
        )
    return compare(X, y, claims=list(CLAIMS), **options)
