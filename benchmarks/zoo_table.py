"""The tables of docs/zoo.md, from benchmarks/results/zoo.json."""

from __future__ import annotations

import statistics
import textwrap
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from batchnorm.lab.bench.markdown import replace_table

__all__ = ["filled"]

Record = dict[str, Any]
OPERATIONS = ("convert", "to_torch", "accelerate", "fold", "tune")
LIBRARIES = {"timm": "timm", "torchvision": "torchvision", "transformers": "transformers", "own": "written by hand"}
COLUMNS = ("float32", "float64", "train")
MOST_REASONS = 8


def filled(page: str, content: Record) -> str:
    """Return the page with the sentences and tables of the results."""
    parts = {
        "summary": summary(content),
        "operations": operations_table(content),
        "files": files_table(content),
        "reasons": reasons_table(content),
        "faults": faults_list(content),
    }
    for name, text in parts.items():
        page = replace_table(page, f"zoo.json, {name}", text)
    return page


def library_of(row: Record) -> str:
    """Return the library of a row or an architecture."""
    return str(row["model"]).partition("/")[0]


def rows_of(content: Record) -> list[Record]:
    """Return the rows of models that ran."""
    return [row for row in content["rows"] if "error" not in row and row["norms"]]


def outcomes(content: Record, operation: str) -> Iterator[tuple[Record, Record]]:
    """Iterate over rows and what an operation did to them."""
    for row in rows_of(content):
        if operation in row["operations"]:
            yield row, row["operations"][operation]


def done(outcome: Record) -> int:
    """Return the layers that an operation reached, with an example where it needed one."""
    return int(outcome.get("done_on_example", outcome.get("done", 0)))


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]], texts: int = 1) -> str:
    """Return a table, of which the first columns are texts and the others numbers."""
    lines = [header, ["---"] * texts + ["---:"] * (len(header) - texts), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def summary(content: Record) -> str:
    """Return how many architectures there are, and how many of them were run."""
    architectures = content["architectures"]
    normalized = [each for each in architectures if each.get("norms")]
    run = {row["model"] for row in rows_of(content)}
    parts = []
    for library, title in LIBRARIES.items():
        of = [each for each in normalized if library_of(each) == library]
        ran = sum(each["model"] in run for each in of)
        total = sum(library_of(each) == library for each in architectures)
        of_all = f" with batch norm, of {total:,} architectures" if total > len(of) else ""
        parts.append(f"{title} {ran} of {len(of)}{of_all}")
    brief = {row["model"] for row in rows_of(content) if row.get("briefly")}
    kinds = {(each["file"], each["kinds"]) for each in normalized}
    covered = {(each["file"], each["kinds"]) for each in normalized if each["model"] in run}
    files, with_one = {each["file"] for each in normalized}, {file for file, _ in covered}
    sizes = Counter(row["model"] for row in rows_of(content))
    several = sum(number > 1 for number in sizes.values())
    pixels = [row["size"] for row in rows_of(content) if library_of(row) != "own"]
    versions = ", ".join(f"{name} {version}" for name, version in content["versions"].items())
    text = (
        f"Of {len(normalized)} architectures with batch norm {len(run)} have been run ({'; '.join(parts)}), "
        f"{len(run - brief)} in full and {len(brief)} with outputs in eval mode and float64 only. They come "
        f"from {len(with_one)} of the {len(files)} files or models, and have {len(covered)} of the {len(kinds)} sets "
        f"of module types that there are per file: an architecture with a set that is not among them has not been run "
        f"in any width or depth. Images have {min(pixels, default=0)} to {max(pixels, default=0)} pixels per side, the "
        f"smallest that a model takes; {several} models were run at two or three sizes. Versions: {versions}."
    )
    return textwrap.fill(text, 120, break_on_hyphens=False) + "\n"


def operations_table(content: Record) -> str:
    """Return one row per operation: layers done and left, largest differences, and seconds."""
    header = ["operation", "models", "batch norms", "done", "left", "float32", "float64", "train", "by rounding", "s"]
    rows = []
    for operation in OPERATIONS:
        found = [(row, outcome) for row, outcome in outcomes(content, operation) if "seconds" in outcome]
        if not found:
            continue
        norms, reached = sum(row["norms"] for row, _ in found), sum(done(outcome) for _, outcome in found)
        sound = [outcome for _, outcome in found if not outcome.get("rounding")]
        worst = [max((each[column] for each in sound if column in each), default=None) for column in COLUMNS]
        rounded = sum(bool(outcome.get("rounding")) for _, outcome in found)
        seconds = statistics.median(outcome["seconds"] for _, outcome in found)
        rows.append(
            [f"`{operation}`", f"{len(found)}", f"{norms:,}", f"{reached:,}", f"{norms - reached:,}"]
            + ["" if value is None else f"{value:.1g}" for value in worst]
            + [f"{rounded}", f"{seconds:.2g}"]
        )
    return markdown(header, rows)


def files_table(content: Record) -> str:
    """Return one row per library and file: architectures run and in all, and the share of layers done."""
    header = ["library", "file or model", "run", "of", "batch norms", *(f"`{name}`" for name in OPERATIONS)]
    normalized = [each for each in content["architectures"] if each.get("norms")]
    rows = []
    for library, title in LIBRARIES.items():
        files = sorted({each["file"] for each in normalized if library_of(each) == library})
        for file in files:
            names = {each["model"] for each in normalized if each["file"] == file}
            found = [row for row in rows_of(content) if row["model"] in names]
            cells = [title, short(file), f"{len({row['model'] for row in found})}", f"{len(names)}"]
            cells.append(f"{sum(row['norms'] for row in found):,}")
            rows.append(cells + [share(found, operation) for operation in OPERATIONS])
    return markdown(header, rows, texts=2)


def short(file: str) -> str:
    """Return the name of a file, without the folders that all files of its library share."""
    if file == "zoo_models":
        return "detection, optical flow"
    for prefix in ("timm.models.", "torchvision.models.", "transformers/", "own/"):
        file = file.removeprefix(prefix)
    return file


def share(rows: list[Record], operation: str) -> str:
    """Return the share of batch norms that an operation reached, in percent."""
    found = [row for row in rows if "seconds" in row["operations"].get(operation, {})]
    norms = sum(row["norms"] for row in found)
    reached = sum(done(row["operations"][operation]) for row in found)
    return f"{100 * reached / norms:.0f}%" if norms else ""


def reasons_table(content: Record) -> str:
    """Return the most frequent reasons why an operation left layers alone."""
    rows = []
    for operation in OPERATIONS:
        counts: Counter[str] = Counter()
        models: Counter[str] = Counter()
        for _, outcome in outcomes(content, operation):
            for reason, count in outcome.get("left", {}).items():
                counts[plain(reason)] += count
                models[plain(reason)] += 1
        common = counts.most_common(MOST_REASONS)
        rows += [[f"`{operation}`", cut(reason), f"{count:,}", f"{models[reason]}"] for reason, count in common]
        if len(counts) > MOST_REASONS:
            others = sum(counts.values()) - sum(count for _, count in common)
            rows.append([f"`{operation}`", f"{len(counts) - MOST_REASONS} other reasons", f"{others:,}", ""])
    return markdown(["operation", "reason", "batch norms", "models"], rows, texts=2)


def plain(reason: str) -> str:
    """Return a reason without the names of classes and the messages of errors."""
    if "cannot be read" in reason or "cannot trace" in reason:
        return "the code around it cannot be read without an example"
    return reason.removeprefix("frozen, but not folded: ")


def cut(reason: str) -> str:
    """Return a reason of at most 110 characters."""
    reason = reason.replace("|", "\\|")
    return reason if len(reason) <= 110 else f"{reason[:107]}..."


def faults_list(content: Record) -> str:
    """Return the faults that are left, and the models that did not run."""
    lines = [
        f"- `{row['model']}`, `{operation}`: {fault}"
        for row in rows_of(content)
        for operation, outcome in row["operations"].items()
        for fault in outcome.get("faults", [])
    ]
    counts = Counter(row["error"].partition(":")[0] for row in content["rows"] if "error" in row)
    total = sum(counts.values())
    reasons = "; ".join(f"{count} x {reason}" for reason, count in counts.most_common())
    head = f"Faults: {len(lines) or 'none'}."
    if total:
        head += f" Models that were tried and did not run: {total} ({reasons})."
    return "\n".join([textwrap.fill(head, 120), *([""] if lines else []), *lines]) + "\n"
