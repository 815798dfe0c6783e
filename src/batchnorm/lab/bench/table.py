"""Results in a terminal of 80 columns."""

from __future__ import annotations

import itertools
from typing import Any

from rich.console import Console
from rich.table import Table

from batchnorm.lab.bench.summary import LARGE, geometric_means, timed, worst

__all__ = ["duration", "show"]


def duration(micro: float) -> str:
    """Microseconds in three figures and a fitting unit; whole ones up to 10 ms."""
    if micro < 10_000:
        return f"{micro:.3g} us" if micro < 1000 else f"{micro:.0f} us"
    return f"{micro / 1e3:.3g} ms" if micro < 999_500 else f"{micro / 1e6:.3g} s"


def _table(first: str, *headings: str) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column(first, no_wrap=True)
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    return table


def _ratio(result: dict[str, Any], key: str) -> str:
    return f"{result[key]['median']:.2f}" if key in result else ""


def _kernels(out: Console, content: dict[str, Any]) -> None:
    compiled = any("times_faster_than_compiled" in result for result in content["results"])
    for (shape, dtype, layout), group in itertools.groupby(
        content["results"], key=lambda result: (result["shape"], result["dtype"], result["layout"])
    ):
        results = list(group)
        out.print(f"{'x'.join(map(str, shape))} {dtype} {layout}, {results[0]['bytes'] / 1e6:.3g} MB", style="bold")
        compile_heading = ["/com-\npile"] if compiled else []
        table = _table(
            "", "ours", "torch", "torch\n/ours", *compile_heading, "GB/s", "copies:\nours", "\ntorch", "\nfloor"
        )
        for result in results:
            name = f"{result['operation']} {result['mode']}"
            if result["fault"]:
                table.add_row(name, "wrong")
                continue
            copies, times = result["copies"], result["microseconds"]
            table.add_row(
                name,
                *(duration(times[side]["median"]) for side in ("ours", "torch")),
                _ratio(result, "times_faster"),
                *([_ratio(result, "times_faster_than_compiled")] if compiled else []),
                f"{result['gigabytes_per_second']:.3g}",
                *(f"{copies[of]:.1f}" for of in ("ours", "torch", "floor")),
            )
        out.print(table)
        out.print()
    means = geometric_means(content)
    if means:
        out.print(f"Geometric means over the cases of {LARGE // 10**6} MB and more", style="bold")
        table = _table("", "cases", "torch\n/ours", "copies:\nours", "\ntorch", "ours\n/floor")
        for mean in means:
            numbers = (mean.times_faster, mean.copies, mean.copies_torch, mean.floors)
            table.add_row(mean.group, str(mean.cases), *(f"{number:.2f}" for number in numbers))
        out.print(table)
        out.print()
    if timed(content):
        out.print("Least ahead", style="bold")
        table = _table("", "torch/ours")
        for result in worst(content):
            table.add_row(result["name"], _ratio(result, "times_faster"))
        out.print(table)


def _processes(out: Console, content: dict[str, Any]) -> None:
    models = content["kind"] == "models"
    table = _table(
        "", "ours", "torch", "torch,\nuntuned", "torch\n/ours", "untuned\n/ours", *(["BN's\nshare"] if models else [])
    )
    for result in timed(content):
        table.add_row(
            f"{result['model']}/{result['layout']}" if models else result["name"].split("/", 3)[-1],
            *(duration(result["microseconds"][side]["median"]) for side in ("ours", "torch", "untuned")),
            _ratio(result, "times_faster"),
            _ratio(result, "times_faster_than_untuned"),
            *([f"{100 * result['share']['torch']:.0f}%"] if models else []),
        )
    out.print(table)
    out.print(
        f"{'Steps of ' + str(content['results'][0]['batch']) + ' images' if models else 'bn+relu, train, float32'}."
    )
    out.print("untuned: without bn.tune_allocator(), in a process of its own")
    if models:
        out.print("BN's share: of torch's step, batch norm with activations and additions")


def show(out: Console, content: dict[str, Any]) -> None:
    """The machine, the results, their means, and what is wrong."""
    machine = content["machine"]
    out.print(
        f"{machine['processor']}, {machine['cores']} cores, {machine['threads']} threads; torch {machine['torch']}; "
        f"kernels: {machine['kernels']}; allocator: {machine['allocator']}"
    )
    out.print()
    if content["results"]:
        (_kernels if content["kind"] == "kernels" else _processes)(out, content)
    for result in content["results"]:
        if result["fault"]:
            out.print(f"wrong, so not timed: {result['name']}: {result['fault']}")
    if not content["complete"]:
        out.print(f"Stopped after {len(content['results'])} cases.")
