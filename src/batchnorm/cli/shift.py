"""``batchnorm shift``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from batchnorm.cli.options import (
    Categorical,
    Data,
    Dates,
    Header,
    Json,
    Missing,
    Numeric,
    at_least,
    between,
    parse_names,
)
from batchnorm.errors import InputError
from batchnorm.lab.data.sources import check_source

__all__ = ["shift"]


def shift(
    *,
    model: Annotated[
        str, typer.Argument(help="MODULE:NAME of a trained model or of a function that returns it.", metavar="MODEL")
    ],
    data: Data,
    weights: Annotated[
        Path | None, typer.Option(help="State dict to load, from torch.save or safetensors.", metavar="FILE")
    ] = None,
    target: Annotated[
        str | None, typer.Option(help="Column to predict; adds scores to the result.", metavar="COLUMN")
    ] = None,
    columns: Annotated[
        str | None, typer.Option(help="Columns of the features, in the order of the model's inputs.", metavar="A,B")
    ] = None,
    numeric: Numeric = None,
    categorical: Categorical = None,
    missing: Missing = None,
    dates: Dates = None,
    header: Header = None,
    reference: Annotated[
        str | None,
        typer.Option(help="Data set without a shift (default: the stored statistics).", metavar="DATA"),
    ] = None,
    alpha: Annotated[
        float, typer.Option(help="Probability of a false alarm.", metavar="P", callback=between(0, 1))
    ] = 0.05,
    reference_samples: Annotated[
        int,
        typer.Option(
            help="Samples that the stored statistics count as, without --reference.",
            metavar="N",
            callback=at_least(1),
        ),
    ] = 256,
    prior: Annotated[
        float,
        typer.Option(
            help="Samples that the stored statistics count as in adaptation.", metavar="N", callback=at_least(0)
        ),
    ] = 16,
    fail_on_shift: Annotated[
        bool, typer.Option("--fail-on-shift", help="Exit with status 1 if the data has shifted.")
    ] = False,
    json_output: Json = False,
) -> None:
    """Test data for a shift against a trained model.

    The covariate shift is measured against the statistics that the model stores. With --target, the model's score is
    shown as it is, adapted and retrained.
    """
    module, _, name = model.partition(":")
    if not (module and name):
        raise InputError(f"model must be MODULE:NAME, such as train:make_model; got {model!r}")
    for source in (data, reference):
        if source is not None:
            check_source(source)

    from batchnorm.lab.console import ProgressLine
    from batchnorm.lab.data.reading import Reading
    from batchnorm.lab.serving.served import load
    from batchnorm.lab.serving.shift import examine, read_rows

    reading = Reading(missing or [], dates, header, parse_names(numeric), parse_names(categorical))
    rows = read_rows(data, target, parse_names(columns), reading)
    known = None if reference is None else read_rows(reference, target, parse_names(columns), reading)
    served = load(model, weights)
    with ProgressLine(transient=True) as line:
        found = examine(
            served, rows, known, prior=prior, alpha=alpha, reference_samples=reference_samples, say=line.show
        )
    typer.echo(found.to_json() if json_output else str(found))
    if fail_on_shift and found.shift.shifted:
        raise typer.Exit(1)
