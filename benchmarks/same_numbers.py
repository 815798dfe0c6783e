"""Prove that a change of the code changes no number: record digests before it, and check them after it.

    python benchmarks/same_numbers.py --record numbers.json   # before the change
    python benchmarks/same_numbers.py --check numbers.json    # after it; exit status 1 if a group differs

Each group of cases yields named numbers: outputs, gradients, running statistics, losses, reports. Its digest is the
SHA-256 of their names, dtypes, shapes and raw bytes, so that a difference in the last bit shows, -0.0 for 0.0 included.
Every group runs on the native and on the reference kernels, each in a process of its own, on one thread. Digests hold
for one processor and one version of torch and of the other dependencies: `--check` refuses another processor or torch.

With `--dump DIR` the numbers themselves are written as well, one NPZ file per group, to locate a difference.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from same_numbers_functions import FUNCTION_GROUPS
from same_numbers_lab import LAB_GROUPS
from same_numbers_layers import LAYER_GROUPS
from same_numbers_statistics import STATISTICS_GROUPS
from same_numbers_values import Value, Values

import batchnorm as bn

GROUPS = LAYER_GROUPS | FUNCTION_GROUPS | STATISTICS_GROUPS | LAB_GROUPS
FAILED = "failed: "
KERNELS = ("native", "reference")
ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}


def describe_machine() -> dict[str, str]:
    """Return the properties of the machine on which the digests depend: processor, instruction set, and torch."""
    information = Path("/proc/cpuinfo")
    lines = information.read_text().splitlines() if information.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    processor = models[0] if models else platform.processor()
    return {
        "machine": f"{processor}, {bn.kernels().cpu.instructions}",
        "torch": str(torch.__version__),
    }


def as_array(value: Value) -> tuple[str, NDArray[Any]]:
    """Return the dtype and the exact bits of a value; bfloat16, which NumPy lacks, becomes 16-bit integers."""
    if value is None:
        return "missing", np.empty(0)
    if isinstance(value, torch.Tensor):
        values = value.detach().contiguous()
        bits = values.view(torch.int16) if values.dtype == torch.bfloat16 else values
        return str(values.dtype), bits.numpy()
    array = np.ascontiguousarray(value) if np.ndim(value) else np.asarray(value)
    return str(array.dtype), array


def digest(values: Values, dump: Path | None) -> str:
    """Return the SHA-256 of the values, and write them to the NPZ file ``dump`` where one is given."""
    found = hashlib.sha256()
    seen: dict[str, NDArray[Any]] = {}
    for name, value in values:
        if name in seen:
            raise ValueError(f"each value of a group must have a name of its own; got {name!r} twice")
        dtype, array = as_array(value)
        found.update(f"{name} {dtype} {array.shape}\n".encode())
        found.update(array.tobytes())
        seen[name] = np.empty(0) if dump is None else array.copy()  # a buffer goes on changing
    if not seen:
        raise ValueError("a group must yield at least one value; got none")
    if dump is not None:
        dump.parent.mkdir(parents=True, exist_ok=True)
        np.savez(dump, **seen)
    return found.hexdigest()


def digest_groups(names: list[str], dump: Path | None) -> dict[str, str]:
    """Return the digest of each group on the kernels that this process runs, or the error that it ended with."""
    torch.set_num_threads(1)
    kernels = bn.kernels().cpu.name
    digests = {}
    for name in names:
        started = time.perf_counter()
        torch.manual_seed(0)
        group = f"{kernels}-{name}"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # some cases are meant to be unusual
            try:
                digests[group] = digest(GROUPS[name](), None if dump is None else dump / f"{group}.npz")
            except Exception as error:  # noqa: BLE001 (the other groups still run)
                traceback.print_exc()
                digests[group] = f"{FAILED}{error!r}"
        print(f"{group:<28} {time.perf_counter() - started:6.1f} s", file=sys.stderr)  # noqa: T201
    return digests


def digest_in_new_process(kernels: str, names: list[str], dump: Path | None) -> dict[str, str]:
    """Return the digest of each group on one kind of kernels, which a process chooses once."""
    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder) / "digests.json"
        command = [sys.executable, __file__, "--worker", str(results), *(f"--only={name}" for name in names)]
        command += [] if dump is None else ["--dump", str(dump)]
        subprocess.run(command, env=os.environ | ONE_THREAD | {"BATCHNORM_KERNELS": kernels}, check=True)
        digests: dict[str, str] = json.loads(results.read_text())
    return digests


def measure(names: list[str], dump: Path | None) -> dict[str, Any]:
    """Return the digests of the groups on all kernels, and the machine that they were made on."""
    print(f"The numbers of {Path(bn.__file__).parent}:", file=sys.stderr)  # noqa: T201
    groups: dict[str, str] = {}
    for kernels in KERNELS:
        groups |= digest_in_new_process(kernels, names, dump)
    return {**describe_machine(), "groups": groups}


def record(file: Path, names: list[str], dump: Path | None) -> None:
    """Write the digests to a file, unless a group fails."""
    content = measure(names, dump)
    failed = [group for group, value in content["groups"].items() if value.startswith(FAILED)]
    if failed:
        raise SystemExit(f"every group must run to its end to be recorded; not so {', '.join(failed)}")
    file.write_text(json.dumps(content, indent=1) + "\n")


def check(file: Path, names: list[str], dump: Path | None) -> None:
    """Compare the digests with those of a file; exit with status 1 if a group differs, fails or is missing."""
    recorded, machine = json.loads(file.read_text()), describe_machine()
    if not machine.items() <= recorded.items():
        print(f"{file} must be recorded on this machine, {machine}", file=sys.stderr)  # noqa: T201
        raise SystemExit(2)
    found = measure(names, dump)["groups"]
    expected = {group: value for group, value in recorded["groups"].items() if group.partition("-")[2] in names}
    differing = [group for group in expected | found if expected.get(group) != found.get(group)]
    for group in differing:
        result = found.get(group, "missing")
        print(f"{group}: {result if result.startswith(FAILED) else 'differs'}")  # noqa: T201
    if differing:
        raise SystemExit(1)
    print(f"all {len(found)} groups are as in {file}")  # noqa: T201


def parse_arguments() -> argparse.Namespace:
    """Return the arguments of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument("--record", type=Path, metavar="FILE", help="JSON file to write the digests to")
    action.add_argument("--check", type=Path, metavar="FILE", help="JSON file of the digests to compare with")
    action.add_argument("--worker", type=Path, metavar="FILE", help=argparse.SUPPRESS)
    parser.add_argument("--only", action="append", choices=GROUPS, metavar="GROUP", help=f"One of {', '.join(GROUPS)}")
    parser.add_argument("--dump", type=Path, metavar="DIR", help="Folder to write the numbers to, as NPZ files")
    return parser.parse_args()


def main() -> None:
    """Record the digests, or compare them with recorded ones."""
    arguments = parse_arguments()
    names = arguments.only or list(GROUPS)
    if arguments.worker is not None:
        arguments.worker.write_text(json.dumps(digest_groups(names, arguments.dump)))
    elif arguments.record is not None:
        record(arguments.record, names, arguments.dump)
    else:
        check(arguments.check, names, arguments.dump)


if __name__ == "__main__":
    main()
