"""``batchnorm doctor``."""

from __future__ import annotations

import json

import typer

from batchnorm.cli.options import Json

__all__ = ["doctor"]


def doctor(json_output: Json = False) -> None:
    """Show versions, kernels and devices.

    Exit status 1 means that the kernels that BATCHNORM_KERNELS asks for are missing.
    """
    from batchnorm.diagnostics.doctor import doctor as examine

    found = examine()
    typer.echo(json.dumps(found.to_dict(), indent=2) if json_output else str(found))
    if found.problem is not None:
        raise typer.Exit(1)
