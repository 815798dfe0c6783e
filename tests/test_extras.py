"""An install of the core alone, and installs that lack one package of an extra."""

import importlib.util
import re
import subprocess
import sys
import textwrap
import tomllib
from pathlib import Path

import pytest

from batchnorm.errors import MissingDependencyError
from batchnorm.extras import are_installed, needs

EXTRAS = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]["optional-dependencies"]
IMPORT_NAMES = {"scikit-learn": "sklearn"}
LAB = [IMPORT_NAMES.get(name, name) for name in (re.split(r"[^\w-]", line)[0] for line in EXTRAS["lab"])]
OPTIONAL = [*LAB, "safetensors", "transformers", "IPython", "pandas"]

HIDE = """
import sys

class Without:
    def __init__(self, finder): self.finder = finder
    def __getattr__(self, name): return getattr(self.finder, name)
    def find_spec(self, name, path=None, target=None):
        return None if name.partition(".")[0] in {hidden!r} else self.finder.find_spec(name, path, target)

sys.meta_path[:] = map(Without, sys.meta_path)
"""
"""Every finder finds nothing under these names, as where they are not installed: importing one raises the interpreter's
own ModuleNotFoundError, and looking one up gives None. Files that are on the disk but that no import finds are no
different to the library, which reads no package in another way (only `doctor` asks for versions)."""


def python(code, *, without, status=0):
    """Run code in a process in which some packages can't be imported."""
    script = HIDE.format(hidden=tuple(without)) + textwrap.dedent(code)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == status, done.stderr
    return done


def test_the_hidden_packages_look_as_if_they_were_not_installed():
    python(
        f"""
        import importlib.util
        for name in {OPTIONAL!r}:
            assert importlib.util.find_spec(name) is None, name
            try:
                __import__(name)
                raise SystemExit(f"{{name}} was imported")
            except ModuleNotFoundError as error:
                assert (str(error), error.name) == (f"No module named {{name!r}}", name)
        """,
        without=OPTIONAL,
    )


def test_star_import_dir_help_and_inspect_work_without_the_extras():
    python(
        """
        import inspect, pydoc
        import batchnorm as bn
        from batchnorm import *
        from batchnorm.lab import *
        missing = {"BatchNormMLPClassifier", "BatchNormMLPRegressor"}
        assert set(dir(bn)) == set(bn.__all__) and not missing & set(dir(bn)) and "compare" not in dir(bn.lab)
        assert BatchNorm1d is bn.BatchNorm1d and kernels is bn.kernels and not missing & set(globals())
        assert "recalibrate" in dict(inspect.getmembers(bn)) and not inspect.getmembers(bn.lab)
        assert "class BatchNorm1d" in pydoc.plain(pydoc.render_doc(bn)) and pydoc.render_doc(bn.lab)
        """,
        without=OPTIONAL,
    )


ENTRANCES = {
    "bn.BatchNormMLPClassifier": "lab",
    "bn.BatchNormMLPRegressor()": "lab",
    "from batchnorm import BatchNormMLPClassifier": "lab",
    "import batchnorm.lab.estimators.mlp": "lab",
    "pickle.loads(b'cbatchnorm.lab.estimators.classifier\\nBatchNormMLPClassifier\\n.')": "lab",
    "bn.lab.compare(1, 2)": "lab",
    "bn.lab.study": "lab",
    "from batchnorm.lab import Comparison": "lab",
    "from batchnorm.lab.teaching.worked_example import worked_example": "lab",
    "bn.doctor().frame()": "lab",
    "bn.recalibrate(layer, [x], progress=True)": "lab",
    "bn.snapshot(layer, 'layer.safetensors')": "snapshot",
    "bn.restore(layer, 'pyproject.toml')": "snapshot",
    "from batchnorm.lab.bench.models import network; network('resnet50')": "bench",
}


def test_whatever_needs_an_extra_names_it_and_how_to_install_it():
    python(
        f"""
        import pickle, torch, batchnorm as bn
        layer, x = bn.BatchNorm1d(3), torch.randn(8, 3)
        for entrance, extra in {ENTRANCES!r}.items():
            try:
                exec(entrance)
                raise SystemExit(f"{{entrance}} needs no extra")
            except bn.MissingDependencyError as error:
                assert isinstance(error, ImportError) and f"pip install 'batchnorm[{{extra}}]'" in str(error), error
        """,
        without=OPTIONAL,
    )


@pytest.mark.parametrize("package", [name for name in LAB if name != "typer"])
def test_where_one_package_is_missing_a_comparison_names_it_before_it_starts(package, tmp_path):
    code = f"""
        import batchnorm as bn
        from batchnorm.cli import main
        try:
            bn.lab.compare
        except bn.MissingDependencyError as error:
            print(error)
        sys.argv = ["batchnorm", "compare", "digits", "--out", {str(tmp_path / "out")!r}]
        main()
        """
    done = python(code, without=[package], status=2)
    reason = f"needs pip install 'batchnorm[lab]'; {package} is not installed\n"
    assert done.stdout.endswith(reason)
    assert done.stderr == f"error: batchnorm compare {reason}"
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("package", ["polars", "plotly", "jinja2", "rich", "typer"])
def test_the_estimators_need_scikit_learn_alone(package):
    python("import batchnorm as bn; bn.BatchNormMLPClassifier((4,), max_iter=1)", without=[package])


@pytest.mark.parametrize(
    "start", ["import runpy; runpy.run_module('batchnorm', run_name='__main__')", "import batchnorm.cli"]
)
def test_without_the_lab_the_command_is_one_sentence(start):
    done = python(start, without=OPTIONAL, status=1)
    assert done.stderr == "error: the command line needs pip install 'batchnorm[lab]'; typer is not installed\n"


def test_python_dash_m_is_the_same_command():
    runs = [
        subprocess.run([sys.executable, *start, "explain", "--help"], capture_output=True, text=True, check=True)
        for start in (["-m", "batchnorm"], ["-c", "from batchnorm.cli import main; main()"])
    ]
    assert runs[0].stdout == runs[1].stdout
    assert runs[0].stdout.startswith("Usage: batchnorm explain ")


def test_an_outdated_package_is_told_from_one_that_is_missing():
    with (
        pytest.raises(MissingDependencyError, match=r"an import failed: cannot import name 'no_such_name' from 'json'"),
        needs("this test"),
    ):
        from json import no_such_name  # noqa: F401


def test_a_missing_file_of_the_library_itself_is_not_taken_for_an_extra():
    with pytest.raises(ModuleNotFoundError, match=r"No module named 'batchnorm\.absent'") as raised, needs("this test"):
        import batchnorm.absent  # noqa: F401
    assert not isinstance(raised.value, MissingDependencyError)


def test_a_package_hidden_in_sys_modules_counts_as_missing(monkeypatch):
    assert are_installed("json")
    monkeypatch.setitem(sys.modules, "json", None)
    assert not are_installed("json")
    assert importlib.util.find_spec("json") is None
