"""``batchnorm bench``."""

from __future__ import annotations

import shlex
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated

import typer

from batchnorm.cli.options import Json, Quiet, at_least

__all__ = ["bench"]


def bench(
    *,
    only: Annotated[
        str | None, typer.Option(help="Text in the names of cases, or regular expression.", metavar="TEXT")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Time six cases only, in at most 30 s.")] = False,
    seconds: Annotated[
        float, typer.Option(help="Seconds per case; there are at least 5 rounds.", metavar="S", callback=at_least(0))
    ] = 1.0,
    compile: Annotated[  # noqa: A002 (the option's name)
        bool, typer.Option("--compile", help="Time torch.compile too, in float32 with backward.")
    ] = False,
    stock_allocator: Annotated[
        bool, typer.Option("--stock-allocator", help="Leave glibc's allocator as it is.")
    ] = False,
    allocators: Annotated[
        bool, typer.Option("--allocators", help="Time large arrays with the allocator tuned and as it is.")
    ] = False,
    models: Annotated[bool, typer.Option("--models", help="Time training steps of ResNet-50 and MobileNetV2.")] = False,
    batch: Annotated[int, typer.Option(help="Images per step, with --models.", metavar="N", callback=at_least(2))] = 16,
    threads: Annotated[
        int | None, typer.Option(help="Number of threads (default: torch's).", metavar="N", callback=at_least(1))
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Results file to write, in JSON.", metavar="FILE")] = None,
    table: Annotated[
        Path | None, typer.Option(help="Results file to print as Markdown, without timing.", metavar="FILE")
    ] = None,
    json_output: Json = False,
    quiet: Quiet = False,
) -> None:
    """Time the layers against torch's own.

    Our results are checked first. Exit status 1 means that one is wrong.
    """
    from batchnorm.lab.bench.request import BenchRequest, BenchSettings, cases_of, check_out, select

    kind = BenchRequest(
        allocators=allocators, models=models, quick=quick, compile=compile, stock_allocator=stock_allocator
    ).kind
    check_out(out)
    settings = BenchSettings(seconds=seconds, compile=compile, tuned_allocator=not stock_allocator, threads=threads)
    cases = select(cases_of(kind, quick=quick, batch=batch), only)
    if table is not None:
        _print_table(table)
        return

    from batchnorm.lab.bench.processor import busy_note
    from batchnorm.lab.bench.progress import Bar
    from batchnorm.lab.bench.results_file import json_text
    from batchnorm.lab.bench.run import perform, start
    from batchnorm.lab.bench.table import text

    run = start(kind, settings, shlex.join(["batchnorm", *sys.argv[1:]]))
    bar = None if quiet else Bar(len(cases))
    try:
        with bar or nullcontext():
            perform(run, cases, out, bar.say if bar else lambda _: None, bar.tick if bar else None)
    except KeyboardInterrupt:
        kept = "" if out is None else f", kept in {out}"
        typer.echo(f"Stopped after {len(run.results)} of {len(cases)} cases{kept}.", err=True)
    typer.echo(json_text(run) if json_output else text(run))
    if json_output and not quiet and (busy := busy_note(run)) is not None:
        typer.echo(busy, err=True)
    if not run.complete:
        raise typer.Exit(130)
    if run.faults:
        raise typer.Exit(1)


def _print_table(table: Path) -> None:
    from batchnorm.lab.bench.markdown import markdown
    from batchnorm.lab.bench.results_file import read

    typer.echo(markdown(read(table)), nl=False)
