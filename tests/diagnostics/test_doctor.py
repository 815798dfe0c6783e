"""What `batchnorm doctor` finds and prints."""

import json
import sys

import pytest

import batchnorm as bn
from batchnorm.cli import main
from batchnorm.diagnostics.doctor import installed


@pytest.fixture
def run_doctor(monkeypatch, capsys):
    """Run the command in this process; returns its exit status and what it printed."""
    for name in ("BATCHNORM_KERNELS", "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["batchnorm", "doctor", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        return ended.value.code or 0, capsys.readouterr().out

    return run


def test_it_names_versions_kernels_devices_and_settings_in_80_columns(run_doctor):
    status, text = run_doctor()
    assert status == 0
    labels = [line[:14].strip() for line in text.splitlines() if not line.startswith(" ")]
    assert labels == [
        "Versions",
        "Libraries",
        "System",
        "Processor",
        "Threads",
        "CPU kernels",
        "CUDA kernels",
        "Devices",
        "Allocator",
        "Environment",
    ]
    assert f"batchnorm {bn.__version__}, Python {sys.version.split()[0]}, torch " in text
    assert str(bn.kernels().cpu) in " ".join(text.split())
    assert max(map(len, text.splitlines())) <= 80


def test_json_holds_the_same(run_doctor):
    status, text = run_doctor("--json")
    found = json.loads(text)
    assert status == 0
    assert found["versions"]["batchnorm"] == bn.__version__
    assert found["libraries"]["scikit-learn"] is not None
    assert found["kernels"]["cpu"]["name"] == bn.kernels().cpu.name
    assert found["devices"][0] == "cpu"
    assert found["problem"] is None


@pytest.mark.parametrize("arguments", [(), ("--json",)])
def test_forced_kernels_that_cannot_be_had_are_a_problem_and_exit_1(run_doctor, monkeypatch, arguments):
    monkeypatch.setenv("BATCHNORM_KERNELS", "triton")
    status, text = run_doctor(*arguments)
    assert status == 1
    assert "BATCHNORM_KERNELS=triton is not available" in " ".join(text.split())


def test_variables_that_matter_are_shown_where_they_are_set(run_doctor, monkeypatch):
    assert "OMP_NUM_THREADS" not in run_doctor()[1]
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    assert "Environment   OMP_NUM_THREADS=2" in run_doctor()[1]


def test_a_long_variable_stays_within_80_columns(monkeypatch):
    monkeypatch.setenv("LD_PRELOAD", "/a/folder" * 30)
    assert max(map(len, str(bn.doctor()).splitlines())) == 80


def test_a_missing_library_is_said():
    assert installed(["numpy", "no-such-library"])["no-such-library"] is None
    lacking = bn.doctor().__class__(**{**vars(bn.doctor()), "libraries": {"rich": "15.0", "polars": None}})
    assert "Missing       polars: pip install 'batchnorm[lab]'" in str(lacking)
