"""Build the CPU kernels with the C++ compiler of the system; everything else is in pyproject.toml.

``batchnorm/kernels/_native.so`` is not an extension module but a shared library that needs libc and libm alone. It uses
neither Python nor torch, so that one wheel serves every version of Python. If it can't be built, the package installs
all the same and runs on its reference kernels, and ``batchnorm/kernels/_native.txt`` has the reason.
"""

from __future__ import annotations

import logging
import os
import re
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

SOURCES = Path("src/batchnorm/kernels")
KERNELS = Extension(
    "batchnorm.kernels._native",
    [path.as_posix() for path in sorted(SOURCES.glob("native*.cpp"))],  # one per instruction set, and their caller
    depends=[path.as_posix() for path in sorted(SOURCES.glob("*.h"))],  # the sdist needs them
)
# Never -ffast-math, which flushes subnormals in the whole process; never -fopenmp, which brings a second runtime; never
# -march=native, since the kernels choose their instructions where they run.
COMPILE = [
    "-std=c++17",
    "-O2",
    "-fPIC",
    "-fno-exceptions",
    "-fno-rtti",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fno-threadsafe-statics",
    "-fopenmp-simd",
    "-fvisibility=hidden",
    "-Wno-psabi",
]


def compilers() -> tuple[list[str], list[str]]:
    """Return the command that compiles C++, and the command that links without libstdc++, as for C."""
    cxx = os.environ.get("CXX") or os.environ.get("CC")
    if not cxx:
        cxx = next((name for name in ("c++", "g++", "clang++") if shutil.which(name)), "")
    cc = os.environ.get("CC") or cxx.replace("clang++", "clang").replace("g++", "gcc").replace("c++", "cc")
    for command in (cxx, cc):
        if not command or not shutil.which(shlex.split(command)[0]):
            named = f": {command}" if command else ""
            raise CompileError(f"no C++ compiler was found when batchnorm was installed{named}")
    return shlex.split(cxx), shlex.split(cc)


def run(command: list[str]) -> None:
    """Run a compiler, and raise `CompileError` with its first error if it fails."""
    logging.info(shlex.join(command))
    environment = {**os.environ, "LC_ALL": "C"}
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", env=environment, check=False)
    except OSError as error:
        raise CompileError(f"{command[0]} could not be run when batchnorm was installed: {error}") from error
    sys.stderr.write(done.stderr)
    if done.returncode:
        lines = done.stderr.splitlines() or [f"exit status {done.returncode}"]
        said = next((line for line in lines if "error" in line or "undefined" in line), lines[0]).strip()
        raise CompileError(f"{command[0]} failed when batchnorm was installed: {said[:300]}")


class BuildKernels(build_ext):
    """Compiles and links the C++ files, or writes the reason for a failure next to the place of the library."""

    def get_ext_filename(self, fullname: str) -> str:
        """Return a name that is the same on every platform, because Python does not import the library."""
        return str(Path(*fullname.split(".")).with_suffix(".so"))

    def run(self) -> None:
        """Build the library, or write the reason for a failure."""
        library, reason = self.products()
        library.parent.mkdir(parents=True, exist_ok=True)
        for path in (library, reason):
            path.unlink(missing_ok=True)
        try:
            self.compile(library)
        except CompileError as error:
            reason.write_text(f"{error}\n", encoding="utf-8")
            self.warn(f"batchnorm runs on its slow reference kernels, since {error}")
        if self.inplace:
            for path in (library, reason):
                replace(path, SOURCES / path.name)

    def compile(self, library: Path) -> None:
        """Compile and link; raise `CompileError` with the reason for a failure."""
        if sys.platform == "win32":
            raise CompileError("the native kernels are not built on Windows")
        cxx, cc = compilers()
        platform = self.target()
        flags = {name: shlex.split(os.environ.get(name, "")) for name in ("CPPFLAGS", "CFLAGS", "CXXFLAGS", "LDFLAGS")}
        ours = [*COMPILE, *platform, *flags["CPPFLAGS"], *flags["CFLAGS"], *flags["CXXFLAGS"]]
        into = Path(self.build_temp)
        into.mkdir(parents=True, exist_ok=True)
        objects = {source: str(into / f"{Path(source).stem}.o") for source in KERNELS.sources}
        with ThreadPoolExecutor(os.cpu_count()) as pool:  # each file takes a compiler many seconds
            list(pool.map(lambda source: run([*cxx, *ours, "-c", source, "-o", objects[source]]), objects))
        # A missing symbol of libstdc++ must fail here, and not when the library is loaded.
        whole = [] if sys.platform == "darwin" else ["-Wl,-z,defs"]
        run([*cc, "-shared", *platform, *whole, *flags["LDFLAGS"], *objects.values(), "-lm", "-o", str(library)])

    def target(self) -> list[str]:
        """Return the flags with which macOS's compiler builds a library that fits the tag of the wheel."""
        if not self.plat_name.startswith("macosx-"):
            return []
        _, version, machine = self.plat_name.split("-")
        machines = ["arm64", "x86_64"] if machine == "universal2" else [machine]
        return [f"-mmacosx-version-min={version}", *(flag for name in machines for flag in ("-arch", name))]

    def products(self) -> tuple[Path, Path]:
        """Return the paths of the library and of the reason; a build leaves one of them."""
        library = Path(self.build_lib, self.get_ext_filename(KERNELS.name))
        return library, library.with_suffix(".txt")

    def get_outputs(self) -> list[str]:
        """Return the files that were built."""
        return list(self.get_output_mapping())

    def get_output_mapping(self) -> dict[str, str]:
        """Return the files that were built, each with its path in an editable install."""
        return {str(path): str(SOURCES / path.name) for path in self.products() if path.exists()}


def replace(new: Path, old: Path) -> None:
    """Replace a file, or delete it if there is no new one; a process that has the old one open keeps it whole."""
    if new.exists():
        part = old.with_name(f"{old.name}.part")
        shutil.copyfile(new, part)
        part.replace(old)
    else:
        old.unlink(missing_ok=True)


class TagWheel(bdist_wheel):
    """Tags the wheel py3-none-PLATFORM: the library depends on the platform, but not on the version of Python."""

    def get_tag(self) -> tuple[str, str, str]:
        """Return the tag of a wheel for any Python 3 on the platform of the build."""
        return "py3", "none", super().get_tag()[2]


def description() -> str:
    """Return README.md for a package index, which has neither the images nor the pages that README.md links to.

    An image is left out, and a link to a file becomes its text, followed by the path.
    """
    path = Path(__file__).with_name("README.md")
    if not path.exists():  # only the kernels are built
        return ""
    text = re.sub(r"!\[[^]]*\]\([^)]*\)\n*", "", path.read_text(encoding="utf-8"))

    def without_link(found: re.Match[str]) -> str:
        return f"{found['words']} (`{found['target'].partition('#')[0]}`)"

    text = re.sub(r"\[(?P<words>[^]]+)\]\((?!https?:|#)(?P<target>[^)]+)\)", without_link, text)
    return f"{text}\nPaths such as `docs/layers.md` are those of the repository and of the source distribution.\n"


setup(
    ext_modules=[KERNELS],
    cmdclass={"build_ext": BuildKernels, "bdist_wheel": TagWheel},
    long_description=description(),
    long_description_content_type="text/markdown",
)
