"""The command line: parse, call, print."""

from __future__ import annotations

import json
import shlex
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, cast

try:
    import typer
    from joblib import cpu_count

    from batchnorm.lab.claims import CLAIMS, ClaimTests
    from batchnorm.lab.comparison.conduct import compare as run_comparison
    from batchnorm.lab.comparison.request import Request
    from batchnorm.lab.comparison.resume import resume_run, start_run
    from batchnorm.lab.comparison.run_file import read_run
    from batchnorm.lab.console import console
    from batchnorm.lab.data.dataset import Task
    from batchnorm.lab.data.tables import BUILT_IN, read_table
    from batchnorm.lab.files import json_safe
    from batchnorm.lab.options import parse_numbers
    from batchnorm.lab.report import terminal
    from batchnorm.lab.report.comparison import Comparison
    from batchnorm.lab.report.report import write_report
    from batchnorm.lab.teaching.explain_page import write_page
    from batchnorm.lab.teaching.worked_example import NOTES, from_table, worked_example
    from batchnorm.lab.training.settings import Inputs, Optimizer, Settings
except ModuleNotFoundError as missing:
    sys.exit(f"error: the command line needs pip install 'batchnorm[lab]'; {missing.name} is not installed")

from batchnorm.errors import BatchNormError, InputError
from batchnorm.kernels.allocator import tune_allocator
from batchnorm.version import __version__

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)

OF_ANY_RUN = {"resume", "jobs", "json_output", "quiet"}


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"batchnorm {__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def _main(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Batch normalization: what it is, and what it changes on your own data."""
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


def _names(text: str | None) -> list[str]:
    return [name.strip() for name in text.split(",")] if text else []


@app.command()
def compare(
    context: typer.Context,
    data: Annotated[str, typer.Argument(help=f"{', '.join(BUILT_IN)}, or a CSV, TSV, Parquet or NPZ file.")] = "digits",
    target: Annotated[str | None, typer.Option(help="Column to predict.")] = None,
    task: Annotated[str | None, typer.Option(help="classification or regression; else inferred.")] = None,
    numeric: Annotated[str | None, typer.Option(help="Columns to take as numbers.", metavar="A,B")] = None,
    categorical: Annotated[str | None, typer.Option(help="Columns to take as categories.", metavar="A,B")] = None,
    rows: Annotated[int | None, typer.Option(help="Rows of placement to generate.", min=10)] = None,
    hidden: Annotated[str, typer.Option(help="Units of each hidden layer.")] = "100,100,100",
    activation: Annotated[str, typer.Option(help="identity, sigmoid, tanh or relu.")] = "sigmoid",
    batch_size: Annotated[int, typer.Option(help="Rows of a mini-batch.")] = 60,
    optimizer: Annotated[str, typer.Option(help="sgd or adam.")] = "sgd",
    learning_rates: Annotated[str | None, typer.Option(help="Grid to search, used as it is.", metavar="R,R")] = None,
    search_seeds: Annotated[int, typer.Option(help="Runs a learning rate in the search.")] = 3,
    seeds: Annotated[int, typer.Option(help="Fresh runs an arm to confirm.")] = 10,
    steps: Annotated[int, typer.Option(help="Gradient steps of every run.")] = 2000,
    init: Annotated[str | None, typer.Option(help="xavier, he or gaussian:SD; else by the activation.")] = None,
    init_scale: Annotated[float, typer.Option(help="Multiplies the initial weights.")] = 1.0,
    inputs: Annotated[str, typer.Option(help="standardized or unscaled.")] = "standardized",
    target_score: Annotated[
        float | None, typer.Option(help="Validation score to reach; else 0.99 of the best without.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the split and of all that is random.")] = 0,
    study: Annotated[bool, typer.Option("--study", help="Measure every claim made for batch norm, too.")] = False,
    claim: Annotated[
        list[str] | None, typer.Option(help=f"Measure one claim: {', '.join(CLAIMS)}. May be repeated.", metavar="NAME")
    ] = None,
    jobs: Annotated[int | None, typer.Option(help="Processes of one thread; else one a core.", min=1)] = None,
    out: Annotated[Path | None, typer.Option(help="A new or empty folder; else batchnorm-runs/NAME-N.")] = None,
    resume: Annotated[Path | None, typer.Option(help="Go on with the unfinished run of a folder.")] = None,
    json_output: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Show no progress.")] = False,
) -> None:
    """Train a network without batch norm, with it before and with it after the nonlinearity, and compare."""
    notes: list[str] = []
    if resume is not None:
        given = {name for name in context.params if str(context.get_parameter_source(name)).endswith("COMMANDLINE")}
        if given - OF_ANY_RUN:
            names = ", ".join(
                "DATA" if name == "data" else f"--{name.replace('_', '-')}" for name in sorted(given - OF_ANY_RUN)
            )
            raise InputError(f"--resume takes data and settings from the run it goes on with; got {names} too")
        run, dataset = resume_run(resume)
    else:
        if study and claim:
            raise InputError(f"--study measures every claim; got --claim {claim[0]} too")
        claims = ClaimTests(list(CLAIMS) if study else claim or [])
        if task not in (None, "classification", "regression"):
            raise InputError(f"--task must be classification or regression; got {task!r}")
        asked = Settings(
            hidden=parse_numbers(hidden, int, "--hidden"),
            activation=activation,
            batch_size=batch_size,
            optimizer=cast("Optimizer", optimizer),
            learning_rates=parse_numbers(learning_rates, float, "--learning-rates") if learning_rates else None,
            search_seeds=search_seeds,
            seeds=seeds,
            steps=steps,
            init=init,
            init_scale=init_scale,
            inputs=cast("Inputs", inputs),
            target_score=target_score,
            seed=seed,
        )
        request = Request(
            data,
            target,
            rows,
            task=cast("Task | None", task),
            numeric=_names(numeric),
            categorical=_names(categorical),
            claims=claims.names,
        )
        run, dataset, notes = start_run(request, asked, out=out, command=shlex.join(["batchnorm", *sys.argv[1:]]))
    tune_allocator()
    progress = terminal.Silence() if quiet else terminal.Bars()
    if not quiet:
        terminal.describe_data(console(stderr=True), run.data, notes)
    try:
        with progress:
            extension = ClaimTests(run.request.claims) if run.request.claims else None
            run_comparison(dataset, run, jobs=jobs or cpu_count(), progress=progress, extension=extension)
    except KeyboardInterrupt:
        finished = len(run.stacks)
        typer.echo(f"Stopped; the {finished} finished stacks of runs are kept.", err=True)
        typer.echo(f"  batchnorm report {run.folder}             shows them", err=True)
        typer.echo(f"  batchnorm compare --resume {run.folder}   goes on", err=True)
        raise typer.Exit(130) from None
    page = write_report(run)
    if json_output:
        typer.echo(json.dumps(run.result_json, indent=2, allow_nan=False))
    else:
        typer.echo(f"\n{Comparison.of(run)}")
        typer.echo(f"Report: {page}")


@app.command()
def report(folder: Annotated[Path, typer.Argument(help="Folder of a run, finished or not.")]) -> None:
    """Draw report.html again from the run.json of a folder."""
    typer.echo(f"Report: {write_report(read_run(folder))}")


@app.command()
def explain(
    data: Annotated[str | None, typer.Argument(help="Its first rows; else the notes' own four.")] = None,
    target: Annotated[str | None, typer.Option(help="Column to predict.")] = None,
    activation: Annotated[str, typer.Option(help="identity, sigmoid, tanh or relu.")] = "sigmoid",
    html: Annotated[
        Path | None, typer.Option(help="Write one offline page to teach from.", metavar="FILE", show_default=False)
    ] = None,
    json_output: Annotated[bool, typer.Option("--json", help="Print the numbers as JSON.")] = False,
) -> None:
    """Show every number of batch normalization on a mini-batch of 4 rows and one neuron."""
    batch = NOTES if data is None else from_table(read_table(data, target))
    example = worked_example(batch, activation=activation)
    if html is not None:
        write_page(example, html)
    if json_output:
        typer.echo(example.to_json())
    else:
        typer.echo(example.text() if html is None else f"Page: {html}")


@app.command()
def shift(
    model: Annotated[str, typer.Argument(help="MODULE:NAME of a trained model, or of a function that returns it.")],
    data: Annotated[str, typer.Argument(help=f"{', '.join(BUILT_IN)}, or a CSV, TSV, Parquet or NPZ file.")],
    weights: Annotated[Path | None, typer.Option(help="State dict to load: torch.save's, or safetensors.")] = None,
    target: Annotated[str | None, typer.Option(help="Column to predict: scores too.")] = None,
    columns: Annotated[str | None, typer.Option(help="Features, in the model's order.", metavar="A,B")] = None,
    reference: Annotated[str | None, typer.Option(help="Data without a shift to compare with.", metavar="DATA")] = None,
    alpha: Annotated[float, typer.Option(help="Chance of a false alarm to accept.")] = 0.05,
    reference_samples: Annotated[
        int, typer.Option(help="Samples that the stored statistics count as, without --reference.")
    ] = 256,
    prior: Annotated[float, typer.Option(help="What they count as in adapting, in samples.")] = 16,
    fail_on_shift: Annotated[bool, typer.Option("--fail-on-shift", help="Exit 1 where data has shifted.")] = False,
    json_output: Annotated[bool, typer.Option("--json", help="Print the findings as JSON.")] = False,
) -> None:
    """Test data for covariate shift against a trained model's statistics; with --target, score what mends it."""
    from batchnorm.lab.serving.served import load
    from batchnorm.lab.serving.shift import examine, read_rows

    rows = read_rows(data, target, _names(columns))
    known = None if reference is None else read_rows(reference, target, _names(columns))
    served = load(model, weights)
    found = examine(served, rows, known, prior=prior, alpha=alpha, reference_samples=reference_samples)
    typer.echo(found.to_json() if json_output else str(found))
    if fail_on_shift and found.shift.shifted:
        raise typer.Exit(1)


@app.command()
def doctor(json_output: Annotated[bool, typer.Option("--json", help="Print the findings as JSON.")] = False) -> None:
    """Show versions, kernels, devices and settings; exit 1 where BATCHNORM_KERNELS asks for what can't be had."""
    from batchnorm.diagnostics.doctor import doctor as examine

    report = examine()
    typer.echo(json.dumps(report.to_dict(), indent=2) if json_output else str(report))
    if report.problem is not None:
        raise typer.Exit(1)


@app.command()
def bench(
    only: Annotated[str | None, typer.Option(help="Cases whose name has this text or fits it.", metavar="TEXT")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="A handful of cases, within 30 s.")] = False,
    seconds: Annotated[float, typer.Option(help="To time a case for, at least 5 rounds.", min=0)] = 1.0,
    compiled: Annotated[bool, typer.Option("--compile", help="torch.compile, too: float32, with backward.")] = False,
    stock_allocator: Annotated[bool, typer.Option("--stock-allocator", help="Leave the allocator as it is.")] = False,
    allocators: Annotated[bool, typer.Option("--allocators", help="Large arrays, allocator tuned and not.")] = False,
    models: Annotated[bool, typer.Option("--models", help="Whole training steps: ResNet-50, MobileNetV2.")] = False,
    batch: Annotated[int, typer.Option(help="Images of a step of --models.", min=2)] = 16,
    threads: Annotated[int | None, typer.Option(help="Else as many as torch takes.", min=1)] = None,
    out: Annotated[Path | None, typer.Option(help="Write the results as JSON.", metavar="FILE")] = None,
    table: Annotated[Path | None, typer.Option(help="Only print a file as Markdown.", metavar="FILE")] = None,
    json_output: Annotated[bool, typer.Option("--json", help="Print the results as JSON.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Show no progress.")] = False,
) -> None:
    """Time the kernels against torch's, on this machine; exit 1 where a result is wrong."""
    from batchnorm.lab.bench import run
    from batchnorm.lab.bench.markdown import markdown
    from batchnorm.lab.bench.plan import check_request, plan
    from batchnorm.lab.bench.progress import Bar
    from batchnorm.lab.bench.table import show

    if table is not None:
        typer.echo(markdown(run.read(table)), nl=False)
        return
    asked = {"--allocators": allocators, "--models": models, "--quick": quick, "--compile": compiled}
    kind = check_request(asked | {"--stock-allocator": stock_allocator}, out)
    settings = run.Settings(seconds=seconds, compile=compiled, tuned_allocator=not stock_allocator, threads=threads)
    jobs = plan(kind, settings, only=only, quick=quick, batch=batch)
    content = run.start(kind, settings, shlex.join(["batchnorm", *sys.argv[1:]]))
    bar = None if quiet else Bar(len(jobs))
    try:
        with bar or nullcontext():
            run.perform(content, jobs, out, bar.say if bar else lambda _: None)
    except KeyboardInterrupt:
        kept = "" if out is None else f", kept in {out}"
        typer.echo(f"Stopped after {len(content['results'])} of {len(jobs)} cases{kept}.", err=True)
    if json_output:
        typer.echo(json.dumps(json_safe(content), indent=1, allow_nan=False))
    else:
        show(console(), content)
    if not content["complete"]:
        raise typer.Exit(130)
    if run.has_faults(content):
        raise typer.Exit(1)


def main() -> None:
    """Run the command line; an error is one plain sentence and exit status 2."""
    try:
        code = app(standalone_mode=False)
    except typer.TyperException as error:
        message = " ".join(error.format_message().split())
        typer.echo(f"error: {message[:1].lower() + message[1:]}", err=True)
        sys.exit(2)
    except BatchNormError as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(2)
    except (KeyboardInterrupt, typer.Abort):
        sys.exit(130)
    sys.exit(code)
