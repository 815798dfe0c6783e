"""``batchnorm explain``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from batchnorm.cli.options import (
    SOURCES,
    Categorical,
    Dates,
    Header,
    Json,
    Missing,
    Numeric,
    Target,
    one_of,
    parse_names,
)
from batchnorm.lab.data.sources import check_source
from batchnorm.lab.training.settings import Activation

__all__ = ["explain"]


def explain(
    *,
    data: Annotated[
        str | None,
        typer.Argument(help=f"Data set of the 4 rows (default: the example of the notes): {SOURCES}.", metavar="DATA"),
    ] = None,
    target: Target = None,
    numeric: Numeric = None,
    categorical: Categorical = None,
    missing: Missing = None,
    dates: Dates = None,
    header: Header = None,
    activation: Annotated[
        Activation, typer.Option(help="Activation of the neuron.", metavar=one_of(Activation))
    ] = "sigmoid",
    html: Annotated[
        Path | None, typer.Option(help="File to write as an interactive page.", metavar="FILE", show_default=False)
    ] = None,
    json_output: Json = False,
) -> None:
    """Show every number of batch norm for one neuron.

    The mini-batch has 4 rows.
    """
    if data is not None:
        check_source(data)

    from batchnorm.lab.data.reading import Reading
    from batchnorm.lab.data.tables import read_table
    from batchnorm.lab.teaching.explain_page import write_page
    from batchnorm.lab.teaching.from_table import from_table
    from batchnorm.lab.teaching.worked_example import NOTES, worked_example

    reading = Reading(missing or [], dates, header, parse_names(numeric), parse_names(categorical))
    batch = NOTES if data is None else from_table(read_table(data, target, reading=reading))
    example = worked_example(batch, activation=activation)
    if html is not None:
        write_page(example, html)
    if json_output:
        typer.echo(example.to_json())
    else:
        typer.echo(str(example) if html is None else f"Page: {html}")
