"""Results as Markdown tables, for docs/benchmarks.md."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from batchnorm.lab.bench.processor import busy_note
from batchnorm.lab.bench.registry import MODES, OPERATIONS, Case
from batchnorm.lab.bench.results import BenchRun, CaseResult, KernelTiming, ModelTiming
from batchnorm.lab.bench.results_file import read
from batchnorm.lab.bench.summary import LARGE, geometric_means
from batchnorm.lab.bench.table import duration

__all__ = ["fill_page", "markdown", "replace_table"]

HEADINGS = {"train": "Forward and backward", "forward": "Forward only", "eval": "Eval"}


def markdown(run: BenchRun) -> str:
    """Return the machine and the tables of a run."""
    tables = _kernels(run) if run.kind == "kernels" else _processes(run)
    return "\n".join([_machine(run), "", *tables]).strip() + "\n"


def fill_page(page: str, folder: Path) -> str:
    """Put the tables of the results files in a folder between ``<!-- NAME.json -->`` and ``<!-- end -->``.

    A name without a file is left as it is.
    """

    def fill(found: re.Match[str]) -> str:
        path = folder / found["name"]
        return f"<!-- {path.name} -->\n{markdown(read(path))}<!-- end -->" if path.exists() else found[0]

    return re.sub(r"<!-- (?P<name>\S+\.json) -->\n.*?<!-- end -->", fill, page, flags=re.DOTALL)


def replace_table(page: str, name: str, table: str) -> str:
    """Replace the text between ``<!-- NAME -->`` and ``<!-- /NAME -->`` by a table.

    Raises
    ------
    ValueError
        The page does not have both of them.
    """
    begin, end = f"<!-- {name} -->\n", f"<!-- /{name} -->"
    before, found, rest = page.partition(begin)
    _, closed, after = rest.partition(end)
    if not (found and closed):
        raise ValueError(f"the page must have {begin.strip()} and {end}")
    return f"{before}{begin}\n{table}\n{end}{after}"


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return [f"| {' | '.join(line)} |" for line in lines] + [""]


def _machine(run: BenchRun) -> str:
    machine = run.machine
    caches = ", ".join(f"{name} {size / 2**20:.3g} MiB" for name, size in machine.caches.items())
    busy = "" if (note := busy_note(run)) is None else f" {note}"
    stopped = "" if run.complete else " The run was stopped before its end."
    return (
        f"`{run.command}` on {machine.processor}, {machine.cores} cores, {machine.threads} threads"
        f"{f', {caches}' if caches else ''}; {machine.system}, {machine.libc}; Python {machine.python}, "
        f"torch {machine.torch}, batchnorm {machine.batchnorm}; kernels: {machine.kernels}; allocator: "
        f"{machine.allocator}.{stopped}{busy}"
    )


def _cell(result: CaseResult | None) -> str:
    if result is None:
        return ""
    timing = result.timing
    if not isinstance(timing, KernelTiming):
        return "wrong"
    return f"**{timing.speedup.median:.2f}** ({timing.copies.ours:.1f} of {timing.copies.floor:.1f})"


def _kernels(run: BenchRun) -> list[str]:
    lines = [f"Geometric means over the cases of {LARGE // 10**6} MB and more:", ""]
    lines += _table(
        ["cases", "number", "speed-up", "copies, ours", "copies, torch", "ours / floor"],
        (
            [mean.group, str(mean.cases)]
            + [f"{number:.2f}" for number in (mean.speedup, mean.copies, mean.torch_copies, mean.over_floor)]
            for mean in geometric_means(run.timed_kernels())
        ),
    )
    lines += ["Speed-up, and in parentheses our time and the floor in copies of x:", ""]
    for mode in MODES:
        rows: dict[tuple[str, str, str], dict[str, CaseResult]] = {}
        for result in run.results:
            case = result.case
            if isinstance(case, Case) and case.mode == mode:
                rows.setdefault((case.shape_text, case.layout, case.dtype), {})[case.operation] = result
        if rows:
            lines += [f"**{HEADINGS[mode]}**", ""]
            lines += _table(
                ["shape", "layout", "dtype", *OPERATIONS],
                ([*labels, *(_cell(results.get(name)) for name in OPERATIONS)] for labels, results in rows.items()),
            )
    return lines


def _processes(run: BenchRun) -> list[str]:
    share = ["share of batch norm in torch's step"] if run.kind == "models" else []
    rows = []
    for case, timing in run.timed():
        over_untuned = timing.speedup_over_untuned
        rows.append(
            [
                case.name,
                *(duration(timing.microseconds[side].median) for side in ("ours", "torch", "untuned")),
                f"**{timing.speedup.median:.2f}**",
                "" if over_untuned is None else f"**{over_untuned.median:.2f}**",
                *([f"{100 * timing.share.torch:.0f}%"] if isinstance(timing, ModelTiming) else []),
            ]
        )
    return _table(["case", "ours", "torch", "torch, untuned", "speed-up", "speed-up over untuned", *share], rows)
