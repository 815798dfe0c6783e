"""Operate on every architecture with batch norm: python benchmarks/zoo.py --minutes 60 --nice 19.

The models are those of timm, torchvision and transformers that have batch norm, and some written by hand
(`zoo_models.py`, `zoo_networks.py`), with random weights and the smallest images that they take. Each goes through
convert, to_torch, accelerate, fold and tune, and what it computes is compared with what it computed before
(`zoo_checks.py`): the outputs in float32 and float64 and, for convert and accelerate, the outputs, gradients and
statistics of three training steps in float64 (for tune, of one step with frozen statistics).

Each model runs in a process of its own with a limit of time and of memory. The results are written after every model,
to benchmarks/results/zoo.json, and a further run takes up what is missing there: models, or operations of them. The
smallest model of every file of a library comes first, then one of every set of module types, then the others by size.

    python benchmarks/zoo.py --census             # find the architectures with batch norm: 5 minutes
    python benchmarks/zoo.py --only 'timm/res*'   # some models, run again even if they are in the results
    python benchmarks/zoo.py --again faults       # those with a fault, or of a time limit
    python benchmarks/zoo.py --briefly            # compare models that have no row yet in float64 and eval mode only
    python benchmarks/zoo.py --sizes 3            # up to three sizes of images per architecture
    python benchmarks/zoo.py --table              # only write the tables of docs/zoo.md
"""

from __future__ import annotations

import argparse
import fnmatch
import hashlib
import json
import multiprocessing
import os
import resource
import sys
import time
import traceback
import warnings
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import zoo_checks
import zoo_models
import zoo_table

import batchnorm as bn

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks/results/zoo.json"
PAGE = ROOT / "docs/zoo.md"
VERSIONS = ("torch", "timm", "torchvision", "transformers")

Record = dict[str, Any]


def without_values(name: str) -> torch.nn.Module:
    """Return a model without memory for its parameters where it can be built so."""
    for device in ("meta", "cpu"):
        for size in (64, 224):
            try:
                with torch.device(device):
                    return zoo_models.build(name, size)[0]
            except NotImplementedError:  # its initialization needs values
                break
            except zoo_models.SIZE_ERRORS:
                continue
    return zoo_models.build(name, 384)[0]


def census() -> list[Record]:
    """Return every architecture with batch norm: name, file, number of parameters and layers, kinds of modules."""
    found: list[Record] = []
    for library in zoo_models.LIBRARIES:
        for name in zoo_models.names(library):
            begun = time.perf_counter()
            try:
                model = without_values(name)
            except Exception as error:  # noqa: BLE001 (any error: it does not build here)
                found.append({"model": name, "error": f"{type(error).__name__}: {error}"[:200]})
                continue
            kinds = sorted({f"{type(module).__module__}.{type(module).__name__}" for module in model.modules()})
            found.append(
                {
                    "model": name,
                    "norms": len(zoo_checks.norm_layers(model)),
                    "parameters": sum(parameter.numel() for parameter in model.parameters()),
                    "file": type(model).__module__ if library in ("timm", "torchvision") else name,
                    "kinds": hashlib.sha256(" ".join(kinds).encode()).hexdigest()[:8],
                }
            )
            print(found[-1], f"{time.perf_counter() - begun:.1f} s", file=sys.stderr, flush=True)  # noqa: T201
    return found


def in_order(architectures: list[Record]) -> list[Record]:
    """Return the architectures that have batch norm: first one per file, then per set of kinds, then by size."""
    by_size = sorted((each for each in architectures if each.get("norms")), key=lambda each: each["parameters"])
    files: set[str] = set()
    kinds: set[tuple[str, str]] = set()
    ranks: dict[str, int] = {}
    for each in by_size:
        kind = (each["file"], each["kinds"])
        ranks[each["model"]] = 0 if each["file"] not in files else 1 if kind not in kinds else 2
        files.add(each["file"])
        kinds.add(kind)
    return sorted(by_size, key=lambda each: ranks[each["model"]])


# One model, in a process of its own


def measure(name: str, operations: list[str], beyond: int = 0, *, briefly: bool = False) -> Record:
    """Return the row of a model at its smallest size of images above ``beyond``."""
    begun = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the models themselves
        size, model, example = zoo_models.workable(name, beyond)
        shapes = [list(tensor.shape) for tensor in zoo_checks.cast_tensors(example)]
        record: Record = {"model": name, "size": size, "inputs": shapes, "norms": len(zoo_checks.norm_layers(model))}
        found = zoo_checks.check(model, example, operations, briefly=briefly) if record["norms"] else {}
    if briefly:
        record["briefly"] = True
    return record | {"seconds": round(time.perf_counter() - begun, 1), "operations": zoo_checks.as_record(found)}


def child(sender: Connection, limits: argparse.Namespace, arguments: tuple[Any, ...]) -> None:
    """Send the row of a model, or the error that it ended with."""
    limit = int(limits.gigabytes * 2**30)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    try:
        sender.send(measure(*arguments, briefly=limits.briefly))
    except Exception as error:  # noqa: BLE001 (the other models still run)
        if not isinstance(error, zoo_models.UnworkableError | MemoryError):
            traceback.print_exc()
        sender.send({"model": arguments[0], "error": f"{type(error).__name__}: {error}"[:300]})


def measure_apart(arguments: tuple[Any, ...], seconds: float, limits: argparse.Namespace) -> Record:
    """Return the row of a model, measured in a new process that has the libraries loaded."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=child, args=(sender, limits, arguments))
    process.start()
    sender.close()
    try:
        if receiver.poll(seconds):
            record: Record = receiver.recv()
            return record
    except EOFError:
        process.join()
        return {"model": arguments[0], "error": f"the process ended with status {process.exitcode}"}
    finally:
        process.kill()
        process.join()
    return {"model": arguments[0], "error": f"not done within {seconds:.0f} s"}


# The list of work


def available() -> list[str]:
    """Return the operations that this version of the library has."""
    return [name for name in zoo_checks.OPERATIONS if hasattr(bn, name)]


def read() -> Record:
    """Return the results so far."""
    if RESULTS.exists():
        content: Record = json.loads(RESULTS.read_text())
        return content
    return {"command": "", "versions": {}, "architectures": [], "rows": []}


def write(content: Record) -> None:
    """Write the results, one line per row."""
    content["versions"] = {name: str(zoo_models.library(name).__version__) for name in VERSIONS}
    lines = ["{"]
    for key in ("command", "versions"):
        lines.append(f"{json.dumps(key)}: {json.dumps(content[key])},")
    for key, end in (("architectures", ","), ("rows", "")):
        rows = ",\n".join(json.dumps(row) for row in content[key])
        lines.append(f"{json.dumps(key)}: [\n{rows}\n]{end}")
    partial = RESULTS.with_suffix(".partial")
    partial.write_text("\n".join([*lines, "}", ""]))
    partial.replace(RESULTS)


def row_of(content: Record, name: str, size: int | None) -> Record | None:
    """Return the row of a model and size; with None, that of the smallest size."""
    rows = [row for row in content["rows"] if row["model"] == name and size in (None, row.get("size"))]
    return min(rows, key=lambda row: row.get("size", 0), default=None)


def has_fault(row: Record) -> bool:
    """Return whether a row has a fault, or is none because of an error."""
    return "error" in row or any(outcome.get("faults") for outcome in row["operations"].values())


def work(content: Record, arguments: argparse.Namespace) -> list[tuple[str, list[str], int]]:
    """Return what is to be done: the model, the operations, and the size above which to look for another."""
    found = []
    operations = arguments.operations or available()
    for architecture in in_order(content["architectures"]):
        name = architecture["model"]
        if arguments.only and not any(fnmatch.fnmatch(name, pattern) for pattern in arguments.only):
            continue
        row = row_of(content, name, None)
        chosen = arguments.only or arguments.again == "all" or (row and arguments.again == "faults" and has_fault(row))
        in_brief = row is not None and row.get("briefly", False) and not arguments.briefly
        if row is None or chosen or in_brief:
            found.append((name, operations, 0))
        elif "error" not in row and (missing := [each for each in operations if each not in row["operations"]]):
            found.append((name, missing, 0))
    return found


def further_sizes(content: Record, arguments: argparse.Namespace) -> list[tuple[str, list[str], int]]:
    """Return the models that have been run at fewer sizes than asked for, one per set of kinds of modules."""
    sizes: dict[str, list[int]] = {}
    for row in content["rows"]:
        if "error" not in row:
            sizes.setdefault(row["model"], []).append(row["size"])
    operations = arguments.operations or available()
    known = [each["model"] for each in in_order(content["architectures"]) if each["model"] in sizes]
    images = [name for name in known if not name.startswith("own/")]
    return [(name, operations, max(sizes[name])) for name in images if len(sizes[name]) < arguments.sizes]


def store(content: Record, new: Record) -> None:
    """Put a row into the results, in the place of an older one of the same model and size."""
    old = row_of(content, new["model"], new.get("size"))
    failed = [row for row in content["rows"] if row["model"] == new["model"] and "error" in row]
    if old is not None and old.get("briefly") and "error" in new:
        new = old
    elif old is not None and "error" not in old and not old.get("briefly"):
        if "error" in new:
            new = old | {"operations": old["operations"] | {"error": {"faults": [new["error"]]}}}
        else:
            old["operations"].pop("error", None)
            new["operations"] = old["operations"] | new["operations"]
    content["rows"] = [row for row in content["rows"] if row is not old and row not in failed] + [new]


def describe(row: Record) -> str:
    """Return a line about a row."""
    if "error" in row:
        return f"{row['model']:<45} {row['error'][:120]}"
    counts = [f"{name} {outcome.get('done', 0)}" for name, outcome in row["operations"].items()]
    faults = [f"\n    {name}: {text}" for name, each in row["operations"].items() for text in each.get("faults", [])]
    begin = f"{row['model']:<45} {row['size']:>4} {row['norms']:>4} {row['seconds']:>6.1f} s"
    return f"{begin}  {', '.join(counts)}{''.join(faults)}"


def run(content: Record, arguments: argparse.Namespace) -> None:
    """Do the work within the minutes given."""
    end = time.monotonic() + 60 * arguments.minutes
    for library in zoo_models.LIBRARIES[1:]:
        zoo_models.library(library)
    torch.set_num_threads(1)
    bn.kernels()
    todo = work(content, arguments) + (further_sizes(content, arguments) if arguments.sizes > 1 else [])
    for place, (name, operations, beyond) in enumerate(todo):
        left = end - time.monotonic()
        if left < 5:
            break
        row = measure_apart((name, operations, beyond), min(arguments.seconds, left), arguments)
        if "error" in row and left < arguments.seconds:
            break  # the end of the run, not of the model
        if beyond and "error" in row:
            continue
        store(content, row)
        write(content)
        print(f"{place + 1}/{len(todo)} {describe(row)}", flush=True)  # noqa: T201


def parse_arguments() -> argparse.Namespace:
    """Return the arguments of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--census", action="store_true", help="Find the architectures with batch norm, and end")
    parser.add_argument("--table", action="store_true", help="Write the tables of docs/zoo.md, and end")
    parser.add_argument("--only", action="append", metavar="PATTERN", help="Models to run, as 'timm/res*'")
    parser.add_argument("--operations", type=lambda text: text.split(","), metavar="A,B", help="Default: all")
    parser.add_argument("--briefly", action="store_true", help="Compare in float64 and eval mode only")
    parser.add_argument("--again", choices=("faults", "all"), help="Run models again that are in the results")
    parser.add_argument("--sizes", type=int, default=1, metavar="N", help="Sizes of images per model (default: 1)")
    parser.add_argument("--minutes", type=float, default=1e6, metavar="N", help="End after so many minutes")
    parser.add_argument("--seconds", type=float, default=300, metavar="N", help="Limit per model (default: 300)")
    parser.add_argument("--gigabytes", type=float, default=12, metavar="N", help="Memory per model (default: 12)")
    parser.add_argument("--nice", type=int, default=0, metavar="N", help="Priority, up to 19 (lowest)")
    return parser.parse_args()


def main() -> None:
    """Run what is missing, and write the results and the page."""
    arguments = parse_arguments()
    os.nice(arguments.nice)
    content = read()
    if arguments.census:
        content["architectures"] = census()
        write(content)
    elif not arguments.table:
        content["command"] = "python benchmarks/zoo.py"
        run(content, arguments)
    if PAGE.exists():
        PAGE.write_text(zoo_table.filled(PAGE.read_text(), content))


if __name__ == "__main__":
    main()
