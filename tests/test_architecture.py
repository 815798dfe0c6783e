"""The house of CONTRIBUTING: imports run one way, and importing the package loads nothing heavy."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import batchnorm

ROOT = Path(batchnorm.__file__).parent
ORDER = [
    "errors",
    "version",
    "checks",
    "text",
    "reports",
    "torch_internals",
    "processes",
    "kernels",
    "ops",
    "functional",
    "nn",
]
ORDER += ["statistics"]
ORDER += ["diagnostics", "lab", "cli"]
HEAVY = ["typer", "rich", "plotly", "polars", "sklearn", "scipy", "joblib", "jinja2", "triton"]
HEAVY += ["transformers", "batchnorm.lab"]


def modules():
    return sorted(path.relative_to(ROOT) for path in ROOT.rglob("*.py"))


def room(path):
    """The part of the house that a file is in; None for the package's own __init__."""
    return None if path == Path("__init__.py") else path.parts[0].removesuffix(".py")


def imported_rooms(path):
    for node in ast.walk(ast.parse((ROOT / path).read_text())):
        names = []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module] + [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        for name in names:
            parts = name.split(".")
            if parts[0] == "batchnorm" and len(parts) > 1 and parts[1] in ORDER:
                yield parts[1]


@pytest.mark.parametrize("path", [path for path in modules() if room(path)], ids=str)
def test_a_file_imports_only_from_its_own_room_and_those_before_it(path):
    assert room(path) in ORDER
    later = [name for name in imported_rooms(path) if ORDER.index(name) > ORDER.index(room(path))]
    assert later == []


def test_the_check_sees_an_import_that_runs_the_wrong_way():
    assert "lab" in set(imported_rooms(Path("cli.py")))
    assert ORDER.index("lab") < ORDER.index("cli")


def test_importing_the_package_loads_torch_and_nothing_heavier():
    code = f"import sys, batchnorm as bn; bn.Moments; print([m for m in {HEAVY} if m in sys.modules and m != 'scipy'])"
    baseline = f"import sys, torch; print([m for m in {HEAVY} if m in sys.modules])"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    by_torch = subprocess.run([sys.executable, "-c", baseline], capture_output=True, text=True, check=True).stdout
    assert loaded == by_torch.replace("'scipy'", "") == "[]\n"
