"""The command line: parse, call, print.

Commands import what they need when they run, so that ``--help``, ``--version``, shell completion and usage errors don't
wait for torch.
"""

from __future__ import annotations

import sys
from typing import Annotated

try:
    import typer
except ModuleNotFoundError as missing:
    sys.exit(f"error: the command line needs pip install 'batchnorm[lab]'; {missing.name} is not installed")

from batchnorm.cli.bench import bench
from batchnorm.cli.compare import compare, report
from batchnorm.cli.doctor import doctor
from batchnorm.cli.explain import explain
from batchnorm.cli.options import Command, describe_usage_error
from batchnorm.cli.shift import shift
from batchnorm.errors import BatchNormError
from batchnorm.version import __version__

__all__ = ["main"]

app = typer.Typer(pretty_exceptions_enable=False, rich_markup_mode=None)
for command in (compare, report, explain, shift, doctor, bench):
    app.command(cls=Command)(command)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"batchnorm {__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def _without_command(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Batch normalization: how it works, and what it changes on your own data."""
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


def main() -> None:
    """Run the command line. An error is one sentence on stderr, and exit status 2."""
    try:
        code = app(prog_name="batchnorm", standalone_mode=False)
    except typer.TyperException as error:
        message = " ".join(error.format_message().split())
        typer.echo(f"error: {describe_usage_error(message)}", err=True)
        sys.exit(2)
    except BatchNormError as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(2)
    except (KeyboardInterrupt, typer.Abort):
        sys.exit(130)
    sys.exit(code)
