"""Results as plain text for a terminal of 80 columns."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

from batchnorm.lab.bench.processor import busy_note
from batchnorm.lab.bench.registry import Case, ModelCase
from batchnorm.lab.bench.results import BenchRun, KernelTiming, ModelTiming, Timing
from batchnorm.lab.bench.summary import LARGE, geometric_means, slowest
from batchnorm.lab.bench.timing import Quartiles
from batchnorm.text import format_table, wrap

__all__ = ["duration", "text"]


def text(run: BenchRun) -> str:
    """Return the machine, the results, their means and the faults."""
    machine = run.machine
    lines = wrap(
        f"{machine.processor}, {machine.cores} cores, {machine.threads} threads; torch {machine.torch}; "
        f"kernels: {machine.kernels}; allocator: {machine.allocator}"
    )
    lines += ["", *(_kernel_lines(run) if run.kind == "kernels" else _process_lines(run))]
    for result in run.faults:
        lines += wrap(f"wrong, so not timed: {result.case.name}: {result.fault}")
    if (busy := busy_note(run)) is not None:
        lines += [*([""] if lines[-1] else []), *wrap(busy)]
    if not run.complete:
        lines.append(f"Stopped after {len(run.results)} cases.")
    return "\n".join(lines)


def duration(microseconds: float) -> str:
    """Format microseconds with three digits and a suitable unit; up to 10 ms as a whole number.

    >>> duration(1234.5), duration(12345.6)
    ('1234 us', '12.3 ms')
    """
    if microseconds < 10_000:
        return f"{microseconds:.3g} us" if microseconds < 1000 else f"{microseconds:.0f} us"
    return f"{microseconds / 1e3:.3g} ms" if microseconds < 999_500 else f"{microseconds / 1e6:.3g} s"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    columns = list(zip(*rows, strict=True)) if rows else [()] * len(header)
    return [*format_table(header, columns, indent=""), ""]


def _speedup(speedup: Quartiles | None) -> str:
    return "" if speedup is None else f"{speedup.median:.2f}x"


def _kernel_lines(run: BenchRun) -> Iterator[str]:
    timed = run.timed_kernels()
    compiled = any(timing.speedup_over_compiled for _, timing in timed)
    cases = [(result.case, result.timing) for result in run.results if isinstance(result.case, Case)]
    for _, neighbors in itertools.groupby(cases, key=lambda pair: (pair[0].shape, pair[0].dtype, pair[0].layout)):
        group = list(neighbors)
        case = group[0][0]
        yield f"{case.shape_text} {case.dtype} {case.layout}, {case.bytes / 1e6:.3g} MB"
        header = ["", "ours", "torch", "speed-up", *(["compiled"] if compiled else [])]
        rows = [_kernel_row(case, timing, compiled=compiled) for case, timing in group]
        yield from _table([*header, "GB/s", "copies", "torch's", "floor"], rows)
    means = geometric_means(timed)
    if means:
        yield f"Geometric means over the cases of {LARGE // 10**6} MB and more"
        yield from _table(
            ["", "cases", "speed-up", "copies", "torch's", "ours / floor"],
            [
                [
                    mean.group,
                    str(mean.cases),
                    f"{mean.speedup:.2f}x",
                    *(f"{number:.2f}" for number in (mean.copies, mean.torch_copies, mean.over_floor)),
                ]
                for mean in means
            ],
        )
    if timed:
        yield "Smallest speed-ups"
        yield from _table(["", "speed-up"], [[case.name, _speedup(timing.speedup)] for case, timing in slowest(timed)])


def _kernel_row(case: Case, timing: Timing | None, *, compiled: bool) -> list[str]:
    name = f"{case.operation} {case.mode}"
    if not isinstance(timing, KernelTiming):
        return [name, "wrong", *[""] * (6 + compiled)]
    return [
        name,
        *(duration(timing.microseconds[side].median) for side in ("ours", "torch")),
        _speedup(timing.speedup),
        *([_speedup(timing.speedup_over_compiled)] if compiled else []),
        f"{timing.gigabytes_per_second:.3g}",
        *(f"{copies:.1f}" for copies in (timing.copies.ours, timing.copies.torch, timing.copies.floor)),
    ]


def _process_lines(run: BenchRun) -> Iterator[str]:
    models = run.kind == "models"
    rows = []
    for case, timing in run.timed():
        name = f"{case.model}/{case.layout}" if isinstance(case, ModelCase) else f"{case.shape_text}/{case.layout}"
        rows.append(
            [
                name,
                *(duration(timing.microseconds[side].median) for side in ("ours", "torch", "untuned")),
                _speedup(timing.speedup),
                _speedup(timing.speedup_over_untuned),
                *([f"{100 * timing.share.torch:.0f}%"] if isinstance(timing, ModelTiming) else []),
            ]
        )
    share = ["share"] if models else []
    yield from _table(["", "ours", "torch", "untuned", "speed-up", "over untuned", *share], rows)
    first = run.results[0].case if run.results else None
    if isinstance(first, ModelCase):
        yield f"Training steps of {first.batch} images."
    else:
        yield "Training with bn+relu in float32."
    yield "untuned: torch without bn.tune_allocator(), in a process of its own"
    if models:
        yield "share: share of torch's step in batch norm, activations and additions"
