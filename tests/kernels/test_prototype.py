"""The C++ sources against the header of torch's C interface, and the packed record against the C++ sources."""

import re
import struct
from pathlib import Path

import pytest
import torch

from batchnorm.kernels import call, library

HEADER = (Path(torch.__file__).parent / "include/torch/csrc/stable/c/shim.h").read_text()
SOURCE = "\n".join((Path(library.__file__).parent / name).read_text() for name in ("native.h", "native.cpp"))


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


def test_the_record_of_a_call_has_the_names_and_offsets_of_the_struct_in_native_h():
    fields, offset = {}, 0
    for line in only(r"(?s)struct Call \{\n(.*?)\n\};", SOURCE).splitlines():
        declaration = re.sub(r"//.*", "", line).strip().rstrip(";")
        kind, names = re.fullmatch(r"(?:const )?(\w+) (.*)", declaration).groups()
        for name in names.split(","):
            fields[name.strip(" *")] = ("int64_t" if "*" in name else kind, offset)  # all take 8 bytes, without padding
            offset += 8
    assert fields == {
        name: ({int: "int64_t", float: "double"}[kind], offset) for name, kind, offset in call.record_fields()
    }
    assert offset == len(pack_everything())


def pack_everything():
    layout = call.CallLayout(*range(len(call.CallLayout._fields)))
    return call.pack_forward(layout.pack(), **dict.fromkeys(call.FORWARD, 0))


@pytest.mark.parametrize(("pack", "given"), [(call.pack_forward, call.FORWARD), (call.pack_backward, call.BACKWARD)])
def test_a_packer_puts_each_value_at_the_offset_of_its_name(pack, given):
    constants = {name: (float(i) if kind is float else i) for i, (name, kind, _) in enumerate(call.record_fields())}
    layout = call.CallLayout(**{name: constants[name] for name in call.CallLayout._fields})
    pointers = {name: 100 + i for i, name in enumerate(given)}
    record = pack(layout.pack(), **pointers)
    for name, kind, offset in call.record_fields():
        (value,) = struct.unpack_from("=d" if kind is float else "=q", record, offset)
        assert value == (constants[name] if name in call.CallLayout._fields else pointers.get(name, 0)), name


def test_the_library_is_of_the_version_that_is_packed():
    assert int(only(r"int32_t bn_abi\(\) \{ return (\d+); \}", SOURCE)) == library.ABI
    dtypes = only(r"enum Dtype : int64_t \{ ([^}]*) \}", SOURCE).split(", ")
    assert {str(dtype).removeprefix("torch.").upper(): code for dtype, code in call.DTYPES.items()} == {
        name: code for code, name in enumerate(dtypes)
    }
    activations = only(r"enum Activation : int \{ ([^}]*) \}", SOURCE).split(", ")
    assert {str(name or "none").upper(): code for name, code in call.FUSED.items()} == {
        name: code for code, name in enumerate(activations[:-1])
    }
