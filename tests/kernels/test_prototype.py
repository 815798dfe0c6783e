"""What the C++ sources assume of torch's C interface, and native.py of theirs: held to the sources of both."""

import re
from pathlib import Path

import torch

from batchnorm.kernels import native

HEADER = (Path(torch.__file__).parent / "include/torch/csrc/stable/c/shim.h").read_text()
SOURCE = "\n".join((Path(native.__file__).parent / name).read_text() for name in ("native.h", "native.cpp"))
LETTERS = {"int64_t": "q", "double": "d"}


def parameters(declared):
    """The types of a list of parameters, without the names."""
    return [re.sub(r"\s*\b\w+$", "", part.strip()).replace(" ", "") for part in declared.split(",")]


def only(pattern, text):
    found = re.findall(pattern, text)
    assert len(found) == 1, (pattern, found)
    return found[0]


def test_the_function_that_threads_run_is_declared_as_torch_calls_it():
    theirs = parameters(only(r"typedef void \(\*ParallelFunc\)\(([^)]*)\);", HEADER))
    assert theirs == ["int64_t", "int64_t", "void*"]
    assert parameters(only(r"typedef void \(\*Work\)\(([^)]*)\);", SOURCE)) == theirs
    assert parameters(only(r"\nvoid work\(([^)]*)\) \{", SOURCE)) == theirs


def test_torch_parallel_for_is_declared_as_in_torchs_header():
    theirs = parameters(only(r"AOTITorchError torch_parallel_for\(([^)]*)\);", HEADER))
    assert theirs == ["int64_t", "int64_t", "int64_t", "ParallelFunc", "void*"]
    returned, ours = only(r"typedef (\w+) \(\*ParallelFor\)\(([^)]*)\);", SOURCE)
    assert [kind.replace("Work", "ParallelFunc") for kind in parameters(ours)] == theirs
    assert returned == "int32_t"


def test_torch_get_num_threads_is_declared_as_in_torchs_header():
    theirs = parameters(only(r"AOTITorchError\s+torch_get_num_threads\(([^)]*)\);", HEADER))
    assert theirs == ["uint32_t*"]
    # The star stands at the name in our style.
    returned, ours = only(r"typedef (\w+) \(\*CountThreads\)\(([^)]*)\);", SOURCE)
    assert parameters(ours) == theirs
    assert returned == "int32_t"


def test_what_torchs_functions_return_is_an_int32():
    header = Path(torch.__file__).parent / "include/torch/csrc/inductor/aoti_torch/c/macros.h"
    assert only(r"using AOTITorchError = (\w+);", header.read_text()) == "int32_t"


def test_the_record_of_a_call_has_the_fields_that_are_packed():
    fields = []
    for line in only(r"(?s)struct Call \{\n(.*?)\n\};", SOURCE).splitlines():
        declaration = re.sub(r"//.*", "", line).strip().rstrip(";")
        kind, names = re.fullmatch(r"(?:const )?(\w+) (.*)", declaration).groups()
        fields += ["q" if "*" in name else LETTERS[kind] for name in names.split(",")]
    packed = re.sub(r"(\d+)(\w)", lambda m: int(m[1]) * m[2], native._PACK.__self__.format.removeprefix("="))
    assert "".join(fields) == packed
    assert native._PACK.__self__.size == 8 * len(fields)  # without padding, as C lays out words of 8 bytes


def test_the_library_is_of_the_version_that_is_packed():
    assert int(only(r"int32_t bn_abi\(\) \{ return (\d+); \}", SOURCE)) == native.ABI
    dtypes = only(r"enum Dtype : int64_t \{ ([^}]*) \}", SOURCE).split(", ")
    assert {str(dtype).removeprefix("torch.").upper(): code for dtype, code in native.DTYPES.items()} == {
        name: code for code, name in enumerate(dtypes)
    }
    activations = only(r"enum Activation : int \{ ([^}]*) \}", SOURCE).split(", ")
    assert {str(name or "none").upper(): code for name, code in native.FUSED.items()} == {
        name: code for code, name in enumerate(activations[:-1])
    }
