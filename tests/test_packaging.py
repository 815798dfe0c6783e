"""The source distribution, the wheel and the library, and an install where the library can't be built."""

import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

from batchnorm.kernels.library import reason
from support import skip_or_fail

ROOT = Path(__file__).parent.parent
SOURCES = ROOT / "src/batchnorm/kernels"
WARNINGS = "-Wall -Wextra -Werror"
CROSS = "aarch64-linux-gnu-g++"
USED = """
import sys, warnings, torch
import batchnorm as bn
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    for _ in range(2):
        y = bn.BatchNorm1d(3)(torch.tensor([[0.0, 1.0, 2.0], [2.0, 1.0, 0.0]]))
print(bn.__file__)
print(*[warning.message for warning in said], sep="\\n")
print(y.detach().round().tolist())
from batchnorm.cli import main
sys.argv = ["batchnorm", "doctor"]
main()
"""
LOADED = """
import re, torch
from pathlib import Path
def libraries():
    return set(re.findall(r"/\\S+\\.so\\S*", Path("/proc/self/maps").read_text()))
def halved():
    tiny = torch.full((300_000,), 1e-40)
    return (tiny / 2).min().item() > 0 and 1e-310 / 2 > 0
torch.set_num_threads(2)
torch.ones(300_000).sum()
before = libraries()
import batchnorm as bn
from batchnorm.kernels import library
assert library.reason() is None
x = torch.randn(64, 32, 400, requires_grad=True)
bn.BatchNorm1d(32)(x).sum().backward()
new = {Path(path).name for path in libraries() - before}
print(sorted(new), halved())
"""


def run(*command, cwd=ROOT, **environment):
    """Run a command that must succeed; an environment variable given as None is unset."""
    names = {name: value for name, value in {**os.environ, **environment}.items() if value is not None}
    done = subprocess.run([*map(str, command)], cwd=cwd, env=names, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def pip(*arguments, **environment):
    """Run pip without network, with the build tools of this environment."""
    offline = ["--no-build-isolation", "--no-deps", "--no-index", "--no-cache-dir", "--disable-pip-version-check"]
    return run(sys.executable, "-m", "pip", arguments[0], *offline, *arguments[1:], **environment)


@pytest.fixture(scope="module")
def sdist(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sdist")
    run(sys.executable, "-c", f"from setuptools import build_meta; build_meta.build_sdist({str(folder)!r})")
    return next(folder.glob("*.tar.gz"))


@pytest.fixture(scope="module")
def wheel(sdist, tmp_path_factory):
    """The wheel, built from the source distribution with warnings as errors."""
    folder = tmp_path_factory.mktemp("wheel")
    pip("wheel", "-w", folder, sdist, CFLAGS=WARNINGS)
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def library(wheel, tmp_path_factory):
    """The library of the wheel."""
    if shutil.which("readelf") is None:
        skip_or_fail("this test needs readelf: apt-get install binutils")
    with zipfile.ZipFile(wheel) as opened:
        return opened.extract("batchnorm/kernels/_native.so", tmp_path_factory.mktemp("library"))


def packaged():
    """Return the files of src/batchnorm that users get besides the library."""
    for path in (ROOT / "src/batchnorm").rglob("*"):
        if path.is_file() and path.suffix not in (".cpp", ".h", ".pyc") and path.stem != "_native":
            yield path.relative_to(ROOT / "src").as_posix()


def test_the_source_distribution_holds_what_building_and_testing_need(sdist):
    with tarfile.open(sdist) as opened:
        held = {name.partition("/")[2] for name in opened.getnames()}
    sources = {path.relative_to(ROOT).as_posix() for path in (*SOURCES.glob("*.cpp"), *SOURCES.glob("*.h"))}
    tests = {path.relative_to(ROOT).as_posix() for kind in ("*.py", "*.cpp") for path in (ROOT / "tests").rglob(kind)}
    named = {"setup.py", "conftest.py", "Makefile", "constraints.txt", "CHANGELOG.md", "LICENSE", "docs/compare.md"}
    assert sources | tests | named <= held
    assert [name for name in held if "/_native." in name or "__pycache__" in name] == []


def test_the_wheel_asks_for_a_platform_and_for_no_python(wheel):
    tag = re.sub(r"[.-]", "_", sysconfig.get_platform())
    assert wheel.name.endswith(f"-py3-none-{tag}.whl")
    with zipfile.ZipFile(wheel) as opened:
        name = next(name for name in opened.namelist() if name.endswith(".dist-info/WHEEL"))
        said = opened.read(name).decode()
    assert f"Tag: py3-none-{tag}\n" in said
    assert "Root-Is-Purelib: false\n" in said


def test_the_wheel_holds_the_package_and_the_library_and_no_source_of_it(wheel):
    with zipfile.ZipFile(wheel) as opened:
        held = {name for name in opened.namelist() if ".dist-info/" not in name}
        note = "batchnorm/kernels/_native.txt"
        assert note not in held, opened.read(note).decode()
    assert held == {*packaged(), "batchnorm/kernels/_native.so"}


def test_the_description_for_an_index_is_readme_without_relative_links_and_images(tmp_path):
    prepare = f"build_meta.prepare_metadata_for_build_wheel({str(tmp_path)!r})"
    run(sys.executable, "-c", f"from setuptools import build_meta; {prepare}")
    headers, _, described = next(tmp_path.glob("*.dist-info/METADATA")).read_text().partition("\n\n")
    assert "Description-Content-Type: text/markdown" in headers
    targets = re.findall(r"\]\(([^)]*)\)", described)
    assert [target for target in targets if not target.startswith(("https://", "#"))] == []
    assert "![" not in described
    assert "<img" not in described
    readme = (ROOT / "README.md").read_text()
    linked = re.findall(r"\]\(((?!https?:|#)[^)#]+)", re.sub(r"!\[[^]]*\]\([^)]*\)", "", readme))
    assert len(linked) > 10
    assert [path for path in linked if path not in described] == []  # each is named, and the user can find it
    assert all((ROOT / path).exists() for path in linked)
    headings = [line for line in readme.splitlines() if line.startswith("#")]
    assert [line for line in described.splitlines() if line.startswith("#")] == headings


@pytest.mark.skipif(sys.platform != "linux", reason="ELF")
def test_the_library_needs_libc_and_libm_alone(library):
    needed = re.findall(r"\(NEEDED\).*\[(.+)\]", run("readelf", "-d", library))
    assert {name.partition(".")[0] for name in needed} <= {"libc", "libm"}


@pytest.mark.skipif(sys.platform != "linux", reason="ELF")
def test_the_library_shows_its_own_functions_and_no_more(library):
    rows = [line.split() for line in run("readelf", "--dyn-syms", "-W", library).splitlines()]
    shown = {row[7] for row in rows if len(row) == 8 and row[4] in ("GLOBAL", "WEAK") and row[6] != "UND"}
    assert {"bn_abi", "bn_instructions", "bn_use_threads", "bn_set_min_address"} <= shown
    assert [name for name in shown if not name.startswith("bn_")] == []


def test_an_install_without_a_compiler_runs_on_the_reference_and_says_why(sdist, tmp_path):
    (tmp_path / "empty").mkdir()
    pip("install", "--target", tmp_path / "there", sdist, PATH=tmp_path / "empty", CC=None, CXX=None)
    unforced = {"BATCHNORM_KERNELS": None, "BATCHNORM_NATIVE_LIBRARY": None}
    said = run(sys.executable, "-c", USED, cwd=tmp_path, PYTHONPATH=tmp_path / "there", **unforced)
    file, warning, y, *doctor = said.splitlines()
    why = "no C++ compiler was found when batchnorm was installed"
    assert file == str(tmp_path / "there/batchnorm/__init__.py")
    assert warning.startswith(f"batchnorm runs on its slow reference kernels: {why}")
    assert y == "[[-1.0, 0.0, 1.0], [1.0, 0.0, -1.0]]"
    assert f"CPU kernels reference: {why}" in " ".join(" ".join(doctor).split())


@pytest.mark.skipif(sys.platform == "win32", reason="a C++ compiler's options")
def test_a_build_in_place_leaves_the_library_or_the_compilers_first_error(tmp_path):
    kernels = tmp_path / "src/batchnorm/kernels"
    kernels.mkdir(parents=True)
    shutil.copy(ROOT / "setup.py", tmp_path)

    def left_by(source):
        (kernels / "native.cpp").write_text(source)
        run(sys.executable, "setup.py", "-q", "build_ext", "--inplace", cwd=tmp_path)
        return sorted(path.name for path in kernels.iterdir())

    for _ in range(2):
        assert left_by('extern "C" int bn_abi() { return 1; }\n') == ["_native.so", "native.cpp"]
        assert left_by("int one;\nnonsense;\n") == ["_native.txt", "native.cpp"]
    (reason,) = (kernels / "_native.txt").read_text().splitlines()
    assert re.match(r"\S+ failed when batchnorm was installed: src/batchnorm/kernels/native.cpp:2:1: error: ", reason)
    # A symbol that only libstdc++ has must fail at build time, not when the library is loaded.
    assert left_by("int *one() { return new int; }\n") == ["_native.txt", "native.cpp"]


def built(folder, **environment):
    """Build the library, with warnings as errors, and a program that compares it with plain loops."""
    into = ["--build-lib", folder, "--build-temp", folder]
    run(sys.executable, "setup.py", "-q", "build_ext", *into, CC=None, CFLAGS=f"{WARNINGS} -O1", **environment)
    library = folder / "batchnorm/kernels/_native.so"
    assert library.exists(), library.with_suffix(".txt").read_text()
    driver = [ROOT / "tests/kernels/driver.cpp", "-std=c++17", "-I", SOURCES, *WARNINGS.split(), "-Wno-psabi"]
    run(environment["CXX"], *driver, library, "-o", folder / "driver")
    return library, folder / "driver"


def test_the_kernels_compile_for_arm64_without_a_warning_and_agree_with_plain_loops(tmp_path):
    if shutil.which(CROSS) is None:
        pytest.skip(f"this test compiles for arm64: apt-get install g++-{CROSS.removesuffix('-g++')}")
    library, driver = built(tmp_path, CXX=CROSS)
    assert "AArch64" in run(f"{CROSS.removesuffix('g++')}readelf", "-h", library)
    if shutil.which("qemu-aarch64") is None:
        pytest.skip("compiled, but not run: apt-get install qemu-user")
    assert run("qemu-aarch64", "-L", "/usr/aarch64-linux-gnu", driver) == "NEON: 340 cases, 0 wrong\n"


@pytest.mark.skipif(platform.machine() != "x86_64" or sys.platform != "linux", reason="x86-64's instruction sets")
def test_the_kernels_for_a_processor_without_avx2_agree_with_plain_loops(tmp_path):
    if shutil.which("g++") is None:
        skip_or_fail("this test compiles the kernels: apt-get install g++")
    _, driver = built(tmp_path, CXX="g++", CPPFLAGS="-DBN_ONLY=128")
    assert run(driver) == "SSE2: 340 cases, 0 wrong\n"


@pytest.mark.skipif(sys.platform != "linux", reason="/proc/self/maps")
def test_loading_the_library_brings_no_other_and_leaves_the_floating_point_mode():
    if reason() is not None:
        skip_or_fail(f"no native kernels: {reason()}")
    assert run(sys.executable, "-c", LOADED, BATCHNORM_KERNELS="native") == "['_native.so'] True\n"
