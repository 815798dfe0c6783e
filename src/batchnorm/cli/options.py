"""Options that several commands share, and errors of the library in terms of options."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Annotated, Any, TypeVar, get_args

import typer
from typer.core import TyperArgument, TyperCommand, TyperOption

from batchnorm.errors import BatchNormError, InputError
from batchnorm.extras import needs
from batchnorm.lab.data.reading import DateOrder
from batchnorm.lab.data.sources import BUILT_IN_NAMES

__all__ = [
    "Categorical",
    "Command",
    "Data",
    "Dates",
    "Header",
    "Json",
    "Missing",
    "Numeric",
    "Quiet",
    "Target",
    "at_least",
    "between",
    "describe_usage_error",
    "name_options",
    "one_of",
    "parse_names",
    "parse_numbers",
]

Number = TypeVar("Number", int, float)


def one_of(choices: Any) -> str:
    """Return the values of a `Literal` as help shows them.

    >>> from typing import Literal
    >>> one_of(Literal["sgd", "adam"])
    'sgd|adam'
    """
    return "|".join(get_args(choices))


SOURCES = f"{', '.join(BUILT_IN_NAMES)}, or the path of a CSV, TSV, Parquet or NPZ file"

Data = Annotated[str, typer.Argument(help=f"Data set: {SOURCES}.", metavar="DATA")]
Target = Annotated[
    str | None, typer.Option(help="Column to predict (default: y, or that of the data set).", metavar="COLUMN")
]
Missing = Annotated[
    list[str] | None,
    typer.Option(help="Text that stands for a missing value. May be given several times.", metavar="TEXT"),
]
Dates = Annotated[
    DateOrder | None,
    typer.Option(
        help="Order of dates such as 03/04/2020 (default: that of the other dates, else day-first).",
        metavar=one_of(DateOrder),
    ),
]
Numeric = Annotated[str | None, typer.Option(help="Columns to treat as numbers.", metavar="A,B")]
Categorical = Annotated[str | None, typer.Option(help="Columns to treat as categories.", metavar="A,B")]
Header = Annotated[
    bool | None,
    typer.Option("--header/--no-header", help="Whether line 1 of a text file names the columns.", show_default=False),
]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="Show no progress.")]


class Command(TyperCommand):
    """A command whose help names its arguments alone, and whose errors name options rather than parameters."""

    def collect_usage_pieces(self, ctx: typer.Context) -> list[str]:  # type: ignore[override]
        """Return the arguments as ``NAME``, and the optional ones as ``[NAME]``."""
        names = [
            _option(param) if param.required else f"[{_option(param)}]"
            for param in self.params
            if isinstance(param, TyperArgument)
        ]
        return ["[OPTIONS]", *names]

    def format_options(self, ctx: typer.Context, formatter: Any) -> None:  # type: ignore[override]
        """Write the sections of the arguments and of the options; Typer's own adds the type to each argument."""
        arguments, options = [], []
        for param in self.get_params(ctx):
            record = param.get_help_record(ctx)
            if record is not None and isinstance(param, TyperArgument):
                arguments.append((_option(param), record[1]))
            elif record is not None:
                options.append(record)
        for title, records in (("Arguments", arguments), ("Options", options)):
            if records:
                with formatter.section(title):
                    formatter.write_dl(records)

    def get_short_help_str(self, limit: int = 0) -> str:
        """Return the first sentence of the help, which a narrow terminal wraps; Typer's own would cut it."""
        return (self.help or "").partition("\n\n")[0]

    def invoke(self, ctx: typer.Context) -> Any:  # type: ignore[override]
        """Run the command.

        Raises
        ------
        InputError
            The library raised an error of its own; the message has the names of options.
        """
        try:
            with needs(f"batchnorm {self.name}"):
                return super().invoke(ctx)
        except BatchNormError as error:
            names = {param.name: _option(param) for param in self.params if param.name}
            raise InputError(name_options(str(error), names)) from error


def _option(param: Any) -> str:
    """Return the name that a user types for a parameter: ``--seeds``, or ``DATA``."""
    if isinstance(param, TyperArgument):
        return str(param.metavar)
    return max(param.opts, key=len) if isinstance(param, TyperOption) else str(param.name)


def at_least(minimum: float) -> Callable[[typer.CallbackParam, Any], Any]:
    """Return a callback that checks that an option is not below a minimum."""
    return _check(lambda value: value >= minimum, f"at least {minimum}")


def between(low: float, high: float) -> Callable[[typer.CallbackParam, Any], Any]:
    """Return a callback that checks that an option is between two values, which are allowed."""
    return _check(lambda value: low <= value <= high, f"between {low} and {high}")


def _check(allowed: Callable[[Any], bool], rule: str) -> Callable[[typer.CallbackParam, Any], Any]:
    def callback(param: typer.CallbackParam, value: Any) -> Any:
        if value is not None and not allowed(value):
            raise InputError(f"{_option(param)} must be {rule}; got {value}")
        return value

    return callback


def describe_usage_error(message: str) -> str:
    """Turn a message of Typer into a sentence of the form of ours.

    >>> describe_usage_error("Invalid value for '--task': Value error, 'x' is not one of 'a', 'b'.")
    "--task must be one of a, b; got 'x'"
    >>> describe_usage_error(
    ...     "Invalid value for '--steps': Input should be a valid integer, unable to parse string as an integer"
    ... )
    "invalid value for '--steps': it must be a whole number"
    >>> describe_usage_error("No such option: --fast")
    'no such option: --fast'
    """
    found = re.fullmatch(r"Invalid value for '(.+?)': Value error, (.+) is not one of (.+?)\.?", message)
    if found:
        option, value, choices = found.groups()
        choices = choices.replace("'", "")
        return f"{option} must be one of {choices}; got {value}"
    for kind, number in {"integer": "a whole number", "number": "a number"}.items():
        message = re.sub(
            rf"Input should be a valid {kind}, unable to parse string as an? {kind}", f"it must be {number}", message
        )
    return f"{message[:1].lower()}{message[1:]}"


def name_options(message: str, names: dict[str, str]) -> str:
    """Replace the parameters that an error message names by the options of a command.

    A parameter is replaced at the beginning of a message, and where it has a value.

    >>> names = {"batch_size": "--batch-size", "target": "--target", "quick": "--quick"}
    >>> name_options("batch_size must be at least 2; got 1", names)
    '--batch-size must be at least 2; got 1'
    >>> name_options("there is no target column; pass target='price'", names)
    "there is no target column; pass --target 'price'"
    >>> name_options("models can't be combined with quick=True", names)
    "models can't be combined with --quick"
    >>> name_options("line 1 may be a row; pass header=False", {"header": "--header"})
    'line 1 may be a row; pass --no-header'
    """
    first, _, rest = message.partition(" ")
    message = f"{names.get(first, first)} {rest}"
    for name, option in names.items():
        message = re.sub(rf"(?<![\w.]){name}=False\b", option.replace("--", "--no-", 1), message)
        message = re.sub(rf"(?<![\w.]){name}=True\b", option, message)
        message = re.sub(rf"(?<![\w.]){name}=(?=\S)", f"{option} ", message)
    return message


def parse_names(text: str | None) -> list[str]:
    """Return the names of a comma-separated option.

    >>> parse_names("age, height")
    ['age', 'height']
    """
    return [name.strip() for name in text.split(",")] if text else []


def parse_numbers(text: str, kind: type[Number], name: str) -> tuple[Number, ...]:
    """Return the numbers of a comma-separated option.

    >>> parse_numbers("100,50", int, "hidden")
    (100, 50)

    Raises
    ------
    InputError
        A part of the text is not a number of this kind.
    """
    try:
        return tuple(kind(part) for part in text.split(","))
    except ValueError:
        numbers = "whole numbers" if kind is int else "numbers"
        raise InputError(f"{name} must be {numbers} separated by commas; got {text!r}") from None
