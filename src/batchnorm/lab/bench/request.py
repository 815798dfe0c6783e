"""The cases that the command line asks for. Importing this file does not load torch."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from batchnorm.errors import InputError, MissingDependencyError
from batchnorm.extras import are_installed
from batchnorm.lab.bench.registry import CASES, LAYOUTS, MODEL_NAMES, QUICK, AnyCase, ModelCase

__all__ = ["BenchKind", "BenchRequest", "BenchSettings", "cases_of", "check_out", "select"]

BenchKind = Literal["kernels", "allocators", "models"]

ALWAYS_MAPPED = 32 * 2**20
"""Size in bytes from which glibc unmaps freed blocks, however often such blocks were freed before."""


@dataclass(frozen=True)
class BenchSettings:
    """How cases are timed.

    Attributes
    ----------
    seconds : float
        Time per case.
    compile : bool
        Whether torch.compile is timed too.
    tuned_allocator : bool
        Whether `batchnorm.tune_allocator` is called first.
    threads : int or None
        Threads of torch; None keeps torch's own number.
    """

    seconds: float = 1.0
    compile: bool = False
    tuned_allocator: bool = True
    threads: int | None = None


@dataclass(frozen=True)
class BenchRequest:
    """Options that select the cases; `kind` checks that they fit together."""

    allocators: bool = False
    models: bool = False
    quick: bool = False
    compile: bool = False
    stock_allocator: bool = False

    @property
    def kind(self) -> BenchKind:
        """The kind of cases.

        Raises
        ------
        InputError
            The options exclude each other.
        """
        given = [name for name, value in vars(self).items() if value]
        if not given or given[0] not in ("allocators", "models"):
            return "kernels"
        if len(given) > 1:
            raise InputError(f"{given[0]}=True can't be combined with other options; got {given[1]}=True")
        return "allocators" if self.allocators else "models"


def check_out(out: Path | None) -> None:
    """Raise `InputError` unless results can be written to the path."""
    if out is not None and (out.is_dir() or not out.absolute().parent.is_dir()):
        raise InputError(f"out must be a file in a folder that exists; got {str(out)!r}")


def cases_of(kind: BenchKind, *, quick: bool = False, batch: int = 16) -> Sequence[AnyCase]:
    """Return the cases of a kind: all of them, or the few quick kernels; ``batch`` is the number of images per step.

    Raises
    ------
    MissingDependencyError
        The models need transformers, which is not installed.
    """
    if kind == "models":
        if not are_installed("transformers"):
            raise MissingDependencyError(
                "models=True needs pip install 'batchnorm[bench]'; transformers is not installed"
            )
        return [ModelCase(model, layout, batch) for model in MODEL_NAMES for layout in LAYOUTS]
    if kind == "allocators":
        return [case for case in CASES if case.name.startswith("bn+relu/train/float32") and case.bytes > ALWAYS_MAPPED]
    return QUICK if quick else CASES


def select(cases: Sequence[AnyCase], only: str | None) -> list[AnyCase]:
    """Return the cases whose name contains the text ``only``, or else matches it as a regular expression.

    Raises
    ------
    InputError
        The text is neither in a name nor a regular expression that matches one.
    """
    if only is None:
        return list(cases)
    chosen = [case for case in cases if only in case.name]
    if not chosen:
        try:
            chosen = [case for case in cases if re.search(only, case.name)]
        except re.error as error:
            raise InputError(f"only must be a text or a regular expression; got {only!r}: {error}") from error
    if not chosen:
        raise InputError(f"only must match the name of a case, such as {cases[0].name}; got {only!r}")
    return chosen
