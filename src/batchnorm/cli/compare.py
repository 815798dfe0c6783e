"""``batchnorm compare`` and ``batchnorm report``."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from batchnorm.cli.options import (
    Categorical,
    Data,
    Dates,
    Header,
    Json,
    Missing,
    Numeric,
    Quiet,
    Target,
    at_least,
    one_of,
    parse_names,
    parse_numbers,
)
from batchnorm.errors import InputError
from batchnorm.lab.comparison.folders import check_empty, check_run_folder
from batchnorm.lab.data.sources import check_source
from batchnorm.lab.training.settings import Activation, Inputs, Optimizer, Settings

__all__ = ["compare", "report"]

Task = Literal["classification", "regression"]
CLAIMS = ("fewer_steps", "stability", "initial_weights", "regularization", "inputs", "placement", "shift")
"""Names of the claims, here because their files load torch."""

WITH_RESUME = {"resume", "jobs", "json_output", "quiet"}
"""Parameters that may be given together with --resume; the others come from the run."""


def compare(
    context: typer.Context,
    *,
    data: Data = "digits",
    target: Target = None,
    task: Annotated[
        Task | None, typer.Option(help="Kind of target (default: inferred from the column).", metavar=one_of(Task))
    ] = None,
    numeric: Numeric = None,
    categorical: Categorical = None,
    missing: Missing = None,
    dates: Dates = None,
    header: Header = None,
    rows: Annotated[
        int | None,
        typer.Option(help="Rows of placement, which is generated (default: 1000).", metavar="N", callback=at_least(10)),
    ] = None,
    hidden: Annotated[str, typer.Option(help="Units per hidden layer.", metavar="N,N")] = "100,100,100",
    activation: Annotated[
        Activation, typer.Option(help="Activation of the hidden layers.", metavar=one_of(Activation))
    ] = "sigmoid",
    batch_size: Annotated[int, typer.Option(help="Rows per mini-batch.", metavar="N")] = 60,
    optimizer: Annotated[Optimizer, typer.Option(help="Optimizer of every arm.", metavar=one_of(Optimizer))] = "sgd",
    learning_rates: Annotated[
        str | None,
        typer.Option(help="Learning rates to try, without extension (default: 7, and more at an edge).", metavar="R,R"),
    ] = None,
    search_seeds: Annotated[int, typer.Option(help="Runs per learning rate in the search.", metavar="N")] = 3,
    seeds: Annotated[int, typer.Option(help="Runs per arm at its best learning rate.", metavar="N")] = 10,
    steps: Annotated[int, typer.Option(help="Gradient steps per run.", metavar="N")] = 2000,
    init: Annotated[
        str | None,
        typer.Option(
            help="Initial weights: xavier, he or gaussian:SD (default: he for relu, else xavier).", metavar="SCHEME"
        ),
    ] = None,
    init_scale: Annotated[float, typer.Option(help="Factor of the initial weights.", metavar="FACTOR")] = 1.0,
    inputs: Annotated[
        Inputs, typer.Option(help="Scale of the input columns.", metavar=one_of(Inputs))
    ] = "standardized",
    target_score: Annotated[
        float | None,
        typer.Option(
            help="Validation score to reach (default: 0.99 of the best score without batch norm).", metavar="SCORE"
        ),
    ] = None,
    seed: Annotated[
        int, typer.Option(help="Seed of the split, the initial weights and the batch order.", metavar="N")
    ] = 0,
    study: Annotated[bool, typer.Option("--study", help="Also test every claim about batch norm.")] = False,
    claim: Annotated[
        list[str] | None,
        typer.Option(
            help=f"Claim to test: {', '.join(CLAIMS)}. May be given several times.",
            metavar="NAME",
            autocompletion=lambda: CLAIMS,
        ),
    ] = None,
    jobs: Annotated[
        int | None,
        typer.Option(
            help="Number of processes, of one thread each (default: one per core).",
            metavar="N",
            callback=at_least(1),
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="New or empty folder for the results (default: batchnorm-runs/NAME-N).", metavar="FOLDER"),
    ] = None,
    resume: Annotated[
        Path | None, typer.Option(help="Folder of an unfinished run to continue.", metavar="FOLDER")
    ] = None,
    json_output: Json = False,
    quiet: Quiet = False,
) -> None:
    """Compare networks without and with batch norm on your data.

    The same network is trained without batch norm, with it before the activation and with it after the activation.
    """
    if study and claim:
        raise InputError(f"--study tests every claim and excludes --claim; got --claim {claim[0]} too")
    for name in claim or []:
        if name not in CLAIMS:
            raise InputError(f"claim must be one of {', '.join(CLAIMS)}; got {name!r}")
    if resume is None:
        check_source(data)
    else:
        _check_given_with_resume(context)
        check_run_folder(resume, "resume")
    if out is not None:
        check_empty(out)
    widths = parse_numbers(hidden, int, "hidden")
    rates = parse_numbers(learning_rates, float, "learning_rates") if learning_rates else None

    asked = Settings(
        hidden=widths,
        activation=activation,
        batch_size=batch_size,
        optimizer=optimizer,
        learning_rates=rates,
        search_seeds=search_seeds,
        seeds=seeds,
        steps=steps,
        init=init,
        init_scale=init_scale,
        inputs=inputs,
        target_score=target_score,
        seed=seed,
    )

    from joblib import cpu_count

    from batchnorm.kernels.allocator import tune_allocator
    from batchnorm.lab.claims import ClaimTests
    from batchnorm.lab.comparison.conduct import compare as run_comparison
    from batchnorm.lab.comparison.request import Request
    from batchnorm.lab.comparison.resume import resume_run, start_run
    from batchnorm.lab.console import console
    from batchnorm.lab.report import terminal
    from batchnorm.lab.report.comparison import Comparison
    from batchnorm.lab.report.report import write_report

    if resume is not None:
        run, dataset = resume_run(resume)
    else:
        request = Request(
            data,
            target,
            rows,
            task=task,
            numeric=parse_names(numeric),
            categorical=parse_names(categorical),
            claims=list(CLAIMS) if study else ClaimTests(claim or []).names,
            missing=missing or [],
            dates=dates,
            header=header,
        )
        run, dataset = start_run(request, asked, out=out, command=shlex.join(["batchnorm", *sys.argv[1:]]))
    tune_allocator()
    progress = terminal.Silence() if quiet else terminal.Bars()
    if not quiet:
        terminal.describe_data(console(stderr=True), run.data)
    try:
        with progress:
            extension = ClaimTests(run.request.claims) if run.request.claims else None
            run_comparison(dataset, run, jobs=jobs or cpu_count(), progress=progress, extension=extension)
            progress.begin("writing the report")
            page = write_report(run)
    except KeyboardInterrupt:
        folder = shlex.quote(str(run.folder))
        typer.echo(f"Stopped; the {len(run.stacks)} finished stacks of runs are kept.", err=True)
        typer.echo(f"  batchnorm report {folder}             shows them", err=True)
        typer.echo(f"  batchnorm compare --resume {folder}   continues", err=True)
        raise typer.Exit(130) from None
    if json_output:
        typer.echo(json.dumps(run.result_json, indent=2, allow_nan=False))
    else:
        typer.echo(f"\n{Comparison.of(run)}")
        typer.echo(f"Report: {page}")


def _check_given_with_resume(context: typer.Context) -> None:
    """Raise `InputError` if data or settings are given together with --resume."""
    given = {name for name in context.params if str(context.get_parameter_source(name)).endswith("COMMANDLINE")}
    if given - WITH_RESUME:
        names = ", ".join(
            "DATA" if name == "data" else f"--{name.replace('_', '-')}" for name in sorted(given - WITH_RESUME)
        )
        raise InputError(f"--resume takes data and settings from the run that it continues; got {names} too")


def report(folder: Annotated[Path, typer.Argument(help="Folder of a run, finished or not.", metavar="FOLDER")]) -> None:
    """Write report.html from the run.json of a run."""
    check_run_folder(folder)

    from batchnorm.lab.comparison.run_file import read_run
    from batchnorm.lab.report.report import write_report

    typer.echo(f"Report: {write_report(read_run(folder))}")
