"""Which kernels run here: what is found, what is forced, what is said."""

import os
import subprocess
import sys

import pytest

import batchnorm as bn
from batchnorm.kernels import library
from batchnorm.kernels.chosen import cpu_kernel

ABSENT = """
import os, warnings
with warnings.catch_warnings():
    warnings.simplefilter("error")
    import batchnorm as bn
from batchnorm.kernels.chosen import cpu_kernel
try:
    cpu_kernel()
except bn.KernelError as error:
    print(error)
del os.environ["BATCHNORM_KERNELS"]
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    assert cpu_kernel() == cpu_kernel() == bn.kernels().cpu.name == "reference"
print(len(said), said[0].category.__name__, said[0].message)
"""


@pytest.fixture
def forced(monkeypatch):
    monkeypatch.delenv("BATCHNORM_KERNELS", raising=False)
    cpu_kernel.cache_clear()
    yield lambda name: monkeypatch.setenv("BATCHNORM_KERNELS", name)
    cpu_kernel.cache_clear()


def test_the_native_kernels_run_here(forced):
    if library.reason() is not None:
        (pytest.fail if os.environ.get("CI") else pytest.skip)(f"no native kernels: {library.reason()}")
    assert bn.kernels().cpu.name == "native"
    assert str(bn.kernels().cpu) in {f"native ({name})" for name in ("AVX-512", "AVX2", "SSE2", "NEON")}


def test_in_ci_the_tests_fail_without_the_native_kernels():
    test = f"{__file__}::test_the_native_kernels_run_here"
    environment = {**os.environ, "CI": "1", "BATCHNORM_NATIVE_LIBRARY": "/nowhere/_native.so"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", test]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 1, done.stdout
    assert "Failed: no native kernels: " in done.stdout


def test_it_prints_a_line_for_each_kind_of_tensors(forced):
    cpu, cuda = str(bn.kernels()).splitlines()
    assert cpu == f"CPU tensors   {bn.kernels().cpu}"
    assert cuda == "CUDA tensors  reference: this version has no GPU kernels"
    assert repr(bn.kernels()) == f"Kernels(CPU: {bn.kernels().cpu.name}, CUDA: reference)"


def test_a_forced_reference_serves_every_tensor_and_says_who_asked(forced):
    forced("reference")
    assert {str(bn.kernels().cpu), str(bn.kernels().cuda)} == {"reference: BATCHNORM_KERNELS=reference"}


def test_kernels_that_this_version_lacks_raise_when_forced(forced):
    forced("triton")
    with pytest.raises(bn.KernelError, match="BATCHNORM_KERNELS=triton is not available: this version"):
        bn.kernels()


def test_an_unknown_name_raises_with_the_known_ones_and_the_value(forced):
    forced("fast")
    with pytest.raises(bn.KernelError, match="BATCHNORM_KERNELS must be reference or native; got 'fast'"):
        bn.kernels()


def test_a_forced_reference_causes_no_warning_and_an_error_is_not_remembered(forced):
    forced("fast")
    with pytest.raises(bn.KernelError):
        cpu_kernel()
    forced("reference")
    assert cpu_kernel() == "reference"


def test_a_missing_library_raises_if_it_is_forced_and_otherwise_warns_once():
    environment = {**os.environ, "BATCHNORM_KERNELS": "native", "BATCHNORM_NATIVE_LIBRARY": "/nowhere/_native.so"}
    done = subprocess.run([sys.executable, "-c", ABSENT], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    raised, warned = done.stdout.splitlines()
    assert raised.startswith("BATCHNORM_KERNELS=native is not available: ")
    assert warned.startswith("1 RuntimeWarning batchnorm runs on its slow reference kernels: ")
    assert "install a C++ compiler" in warned
