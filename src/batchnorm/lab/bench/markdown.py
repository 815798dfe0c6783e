"""Results as Markdown tables, for docs/benchmarks.md."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from batchnorm.lab.bench.registry import MODES, OPERATIONS
from batchnorm.lab.bench.run import read
from batchnorm.lab.bench.summary import LARGE, geometric_means, timed
from batchnorm.lab.bench.table import duration

__all__ = ["filled", "markdown", "placed"]

HEADINGS = {"train": "Forward and backward", "forward": "Forward alone", "eval": "Eval"}


def _rows(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    lines = [headings, ["---"] + ["---:"] * (len(headings) - 1), *rows]
    return [f"| {' | '.join(line)} |" for line in lines] + [""]


def _machine(content: dict[str, Any]) -> list[str]:
    machine = content["machine"]
    caches = ", ".join(f"{name} {size / 2**20:.3g} MiB" for name, size in machine["caches"].items())
    stopped = "" if content["complete"] else " Stopped before its end."
    return [
        f"`{content['command']}` on {machine['processor']}, {machine['cores']} cores, {machine['threads']} threads"
        f"{f', {caches}' if caches else ''}; {machine['system']}, {machine['libc']}; Python {machine['python']}, "
        f"torch {machine['torch']}, batchnorm {machine['batchnorm']}; kernels: {machine['kernels']}; allocator: "
        f"{machine['allocator']}.{stopped}",
        "",
    ]


def _cell(result: dict[str, Any] | None) -> str:
    if result is None or result["fault"]:
        return "" if result is None else "wrong"
    copies = result["copies"]
    return f"**{result['times_faster']['median']:.2f}** ({copies['ours']:.1f} of {copies['floor']:.1f})"


def _kernels(content: dict[str, Any]) -> list[str]:
    lines = [f"Geometric means over the cases of {LARGE // 10**6} MB and more:", ""]
    lines += _rows(
        ["cases", "number", "torch's time / ours", "copies, ours", "copies, torch", "ours / floor"],
        (
            [mean.group, str(mean.cases)]
            + [f"{number:.2f}" for number in (mean.times_faster, mean.copies, mean.copies_torch, mean.floors)]
            for mean in geometric_means(content)
        ),
    )
    lines += ["Torch's time / ours, and in brackets our copies of the least possible:", ""]
    for mode in MODES:
        by_place: dict[tuple[str, str, str], dict[str, dict[str, Any]]] = {}
        for result in content["results"]:
            if result["mode"] == mode:
                place = ("x".join(map(str, result["shape"])), result["layout"], result["dtype"])
                by_place.setdefault(place, {})[result["operation"]] = result
        if by_place:
            lines += [f"**{HEADINGS[mode]}**", ""]
            lines += _rows(
                ["shape", "layout", "dtype", *OPERATIONS],
                ([*place, *(_cell(found.get(name)) for name in OPERATIONS)] for place, found in by_place.items()),
            )
    return lines


def _processes(content: dict[str, Any]) -> list[str]:
    models = content["kind"] == "models"
    headings = ["case", "ours", "torch", "torch, untuned", "torch / ours", "untuned / ours"]
    return _rows(
        headings + ["BN's share of torch's step"] * models,
        (
            [
                result["name"],
                *(duration(result["microseconds"][side]["median"]) for side in ("ours", "torch", "untuned")),
                f"**{result['times_faster']['median']:.2f}**",
                f"**{result['times_faster_than_untuned']['median']:.2f}**",
                *([f"{100 * result['share']['torch']:.0f}%"] if models else []),
            ]
            for result in timed(content)
        ),
    )


def markdown(content: dict[str, Any]) -> str:
    """The machine and the tables of a results file."""
    tables = _kernels(content) if content["kind"] == "kernels" else _processes(content)
    return "\n".join(_machine(content) + tables).strip() + "\n"


def filled(page: str, folder: Path) -> str:
    """The page with the tables of each file there is between ``<!-- NAME.json -->`` and ``<!-- end -->``."""

    def place(found: re.Match[str]) -> str:
        path = folder / found["name"]
        return f"<!-- {path.name} -->\n{markdown(read(path))}<!-- end -->" if path.exists() else found[0]

    return re.sub(r"<!-- (?P<name>\S+\.json) -->\n.*?<!-- end -->", place, page, flags=re.DOTALL)


def placed(page: str, name: str, table: str) -> str:
    """The page with a table between ``<!-- NAME -->`` and ``<!-- /NAME -->``, in the place of what was there."""
    begin, end = f"<!-- {name} -->\n", f"<!-- /{name} -->"
    before, found, rest = page.partition(begin)
    _, closed, after = rest.partition(end)
    if not (found and closed):
        raise ValueError(f"the page must have {begin.strip()} and {end}")
    return f"{before}{begin}\n{table}\n{end}{after}"
