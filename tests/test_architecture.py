"""The picture in CONTRIBUTING, compared with the imports of every file."""

import ast
import subprocess
import sys
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import batchnorm
from batchnorm import torch_internals

ROOT = Path(batchnorm.__file__).parent

CORE = ["errors", "extras", "checks", "text", "reports", "version", "torch_internals", "processes", "kernels", "ops"]
CORE += ["functional", "nn", "statistics", "surgery", "diagnostics"]
LAB = ["json_records", "files", "machine", "console", "data", "training"]
BRANCHES = [["estimators"], ["comparison", "claims", "report"], ["teaching"], ["serving"], ["bench"]]
ENDS = ["notebook", "cli", "__main__"]

HEAVY = ["typer", "rich", "plotly", "polars", "sklearn", "scipy", "joblib", "jinja2", "triton"]
HEAVY += ["transformers", "batchnorm.lab"]


@cache
def files():
    return sorted(path.relative_to(ROOT) for path in ROOT.rglob("*.py"))


@cache
def tree(path):
    return ast.parse((ROOT / path).read_text())


def module(path):
    parts = ("batchnorm", *path.with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@cache
def modules():
    return {module(path): path for path in files()}


def imports(path):
    """The files that a file imports anywhere, within functions and for types too."""
    for node in ast.walk(tree(path)):
        candidates = []
        if isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            candidates = [(f"{node.module}.{alias.name}", node.module) for alias in node.names]
        elif isinstance(node, ast.Import):
            candidates = [(alias.name,) for alias in node.names]
        for names in candidates:
            yield from (modules()[name] for name in names[:1] if name in modules())
            yield from (modules()[name] for name in names[1:] if name in modules() and names[0] not in modules())


def room(path):
    """The name in the picture of the part that a file belongs to; None for the package's own __init__."""
    parts = [part.removesuffix(".py") for part in path.parts if part != "__init__.py"]
    if parts[:1] == ["lab"]:
        return parts[1] if len(parts) > 1 else "lab"
    return parts[0] if parts else None


@cache
def allowed():
    """For each room the rooms that it may import."""
    before = {name: CORE[: i + 1] for i, name in enumerate(CORE)}
    before |= {name: CORE + LAB[: i + 1] for i, name in enumerate(LAB)}
    for branch in BRANCHES:
        before |= {name: CORE + LAB + branch[: i + 1] for i, name in enumerate(branch)}
    everything = CORE + LAB + [name for branch in BRANCHES for name in branch]
    before |= {name: everything + ENDS[: i + 1] for i, name in enumerate(ENDS)}
    before["lab"] = [*everything, "notebook"]  # its public face
    return before


ROOMS = [path for path in files() if room(path) is not None]  # the package's own __init__ imports from all of them


# Imports run one way.


@pytest.mark.parametrize("path", ROOMS, ids=str)
def test_a_file_imports_only_what_the_picture_lets_it(path):
    assert [str(found) for found in imports(path) if room(found) not in allowed()[room(path)]] == []


def test_the_picture_forbids_an_arrow_between_siblings_and_one_backwards():
    assert "serving" not in allowed()["bench"]
    assert "claims" not in allowed()["comparison"]
    assert "lab" not in allowed()["diagnostics"]


def test_no_files_import_each_other_in_a_circle():
    try:
        list(TopologicalSorter({path: set(imports(path)) for path in ROOMS}).static_order())
    except CycleError as error:
        pytest.fail(" <- ".join(map(str, error.args[1])))


def test_no_file_imports_the_package_as_a_whole():
    whole = Path("__init__.py")
    assert [str(path) for path in ROOMS if whole in imports(path)] == []


def test_importing_the_package_loads_torch_and_nothing_heavier():
    code = f"import sys, batchnorm; print([m for m in {HEAVY} if m in sys.modules and m != 'scipy'])"
    baseline = f"import sys, torch; print([m for m in {HEAVY} if m in sys.modules])"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    by_torch = subprocess.run([sys.executable, "-c", baseline], capture_output=True, text=True, check=True).stdout
    assert loaded == by_torch.replace("'scipy'", "") == "[]\n"


# Private names of torch stand in torch_internals/ alone.

HIDDEN_IN_INSTANCES = {path.rpartition(".")[2] for paths in torch_internals.PATHS.values() for path in paths}
HIDDEN_IN_INSTANCES = {name for name in HIDDEN_IN_INSTANCES if name.startswith("_")} | {"_orig_mod"}


def is_private(name):
    return name.startswith("_") and not name.endswith("__")


def chain(node):
    """The names of ``a.b.c``, or those after whatever else an attribute is taken of."""
    names = []
    while isinstance(node, ast.Attribute):
        names.append(node.attr)
        node = node.value
    return [*([node.id] if isinstance(node, ast.Name) else [""]), *reversed(names)]


def private_names_of_torch(source):
    bound = set()
    for node in ast.walk(source):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "torch":
                    bound.add(alias.asname or "torch")
                    yield from [alias.name] * any(map(is_private, alias.name.split(".")))
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "torch":
            for alias in node.names:
                bound.add(alias.asname or alias.name)
                yield from [f"{node.module}.{alias.name}"] * any(map(is_private, [*node.module.split("."), alias.name]))
    for node in ast.walk(source):
        if isinstance(node, ast.Attribute):
            root, *rest = chain(node)
            if is_private(node.attr) and (root in bound or node.attr in HIDDEN_IN_INSTANCES):
                yield ".".join([root, *rest])
        elif isinstance(node, ast.Call) and chain(node.func) in (["getattr"], ["hasattr"], ["setattr"]):
            target, name = node.args[:2]
            looked_up = name.value if isinstance(name, ast.Constant) else ""
            if is_private(looked_up) and (chain(target)[0] in bound or looked_up in HIDDEN_IN_INSTANCES):
                yield ".".join([*chain(target), looked_up])


@pytest.mark.parametrize("path", [path for path in files() if room(path) not in ["torch_internals"]], ids=str)
def test_a_file_uses_no_private_name_of_torch(path):
    assert list(private_names_of_torch(tree(path))) == []


@pytest.mark.parametrize(
    "code",
    [
        "import torch\ntorch._C._has_storage(x)",
        "from torch.autograd import forward_ad\nforward_ad._current_level",
        "from torch.nn.modules.batchnorm import _BatchNorm",
        "from torch._ops import OpOverload",
        "import torch._dynamo",
        "import torch.distributed as dist\ndist.distributed_c10d._get_default_store()",
        "import torch\ngetattr(torch._C, '_x')",
        "import torch\ngetattr(torch, '_x', None)",
        "x._is_zerotensor()",
        "getattr(model, '_orig_mod', None)",
    ],
)
def test_the_search_finds_a_private_name(code):
    assert list(private_names_of_torch(ast.parse(code)))


@pytest.mark.parametrize("code", ["import torch\ntorch.zeros(1)", "self._x", "record._replace(x=1)", "x.__class__"])
def test_the_search_passes_other_names(code):
    assert list(private_names_of_torch(ast.parse(code))) == []


# Functions take few positional parameters, and the lab hands on records.

MOST_PARAMETERS = 6


def functions(node, prefix="", in_class=False):
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            yield f"{prefix}{child.name}", child, in_class
            yield from functions(child, f"{prefix}{child.name}.")
        elif isinstance(child, ast.ClassDef):
            yield from functions(child, f"{prefix}{child.name}.", in_class=True)
        else:
            yield from functions(child, prefix, in_class)


def positional(function, in_class):
    """How many positional parameters a caller gives."""
    count = len(function.args.posonlyargs) + len(function.args.args)
    static = any(chain(decorator)[-1] == "staticmethod" for decorator in function.decorator_list)
    return count - (in_class and not static)


SIGNATURES = {
    "functional.py": {"batch_norm": "the signature of torch.nn.functional.batch_norm"},
    "nn/layer.py": {"Layer.__init__": "the signature of torch.nn.BatchNorm2d"},
}


def long_functions(path):
    return [name for name, node, in_class in functions(tree(path)) if positional(node, in_class) > MOST_PARAMETERS]


@pytest.mark.parametrize("path", files(), ids=str)
def test_a_function_has_at_most_six_positional_parameters(path):
    assert [name for name in long_functions(path) if name not in SIGNATURES.get(str(path), {})] == []


@pytest.mark.parametrize(("code", "names"), [("def f(a, b, c, d, e, f, g): pass", ["f"]), ("def f(a, *, b): pass", [])])
def test_the_search_counts_positional_parameters(code, names):
    counted = [name for name, node, in_class in functions(ast.parse(code)) if positional(node, in_class) > 6]
    assert counted == names


def is_loose_dictionary(node):
    return isinstance(node, ast.Subscript) and ast.unparse(node) == "dict[str, Any]"


FILE_FORMATS = ["lab/bench/results_file.py", "lab/comparison/run_file.py"]  # they read and write JSON
TO_JSON = ["to_dict", "to_json", "from_json", "_records"]  # methods that give or take values that JSON has


@pytest.mark.parametrize(
    "path",
    [path for path in files() if path.parts[0] == "lab" and str(path) not in FILE_FORMATS],
    ids=str,
)
def test_the_lab_hands_on_records_instead_of_dictionaries(path):
    written = [node for name, node, _ in functions(tree(path)) if name.split(".")[-1] in TO_JSON]
    allowed = {node for function in written for node in ast.walk(function)}
    assert [node for node in ast.walk(tree(path)) if is_loose_dictionary(node) and node not in allowed] == []
