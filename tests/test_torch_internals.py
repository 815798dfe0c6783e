"""Private names of torch: all are found in this torch, and none is needed for right numbers."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from batchnorm import torch_internals
from batchnorm.torch_internals import autograd, lookup, transforms
from support import compiles

NAMES = sorted({path for paths in torch_internals.PATHS.values() for path in paths})
WAYS = ["missing", "raises", "answers another type"]


@pytest.fixture(scope="module")
def failures():
    """What goes wrong by broken name and way: nothing, or a traceback."""
    cases = [(name, way) for name in NAMES for way in WAYS]
    program = Path(__file__).with_name("broken_torch.py")
    done = subprocess.run([sys.executable, program, json.dumps(cases)], capture_output=True, text=True, check=True)
    return dict(zip(cases, json.loads(done.stdout), strict=True))


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", NAMES)
def test_numbers_are_right_where_a_private_name_is_broken(failures, name, way):
    assert failures[name, way] is None, failures[name, way]


def test_importing_the_library_looks_no_private_name_up():
    code = """
import batchnorm
from batchnorm.torch_internals import lookup
print(lookup.FOUND)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


@pytest.mark.parametrize("name", [name for name, paths in torch_internals.PATHS.items() if paths])
def test_this_torch_has_every_private_name_as_known(name):
    """Where one fails the library is slower on this torch; the numbers are right all the same."""
    if name == "fast_apply":
        assert autograd._shortcuts() == (True, True)
        return
    x = torch.zeros(1)
    arguments = (x,) if name.startswith("is_") or name == "has_storage" else ()
    arguments = (x, x) if name == "obstacle_to_update" else arguments
    getattr(torch_internals, name)(*arguments)
    assert name in lookup.FOUND


def test_every_name_is_found_where_it_is_first_asked_for_within_transforms():
    """All threads share the level of forward mode, so it is active in the thread of the probes too."""
    code = f"""
import warnings
warnings.simplefilter("ignore")
import torch
from torch.func import grad, jvp
from batchnorm import torch_internals
def ask(x):
    for name in {[name for name, paths in torch_internals.PATHS.items() if paths and name != "fast_apply"]!r}:
        arguments = (x,) if name.startswith("is_") or name == "has_storage" else ()
        getattr(torch_internals, name)(*((x, x) if name == "obstacle_to_update" else arguments))
    return x.square().sum()
x = torch.ones(1)
jvp(grad(ask), (x,), (x,))
print(sorted(torch_internals.PATHS.keys() - torch_internals.lookup.FOUND))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    without_private_names = {name for name, paths in torch_internals.PATHS.items() if not paths}
    assert done.stdout.strip() == str(sorted({"fast_apply"} | without_private_names))


@compiles
def test_a_function_may_be_compiled_before_any_name_has_been_looked_up():
    code = """
import warnings
warnings.simplefilter("ignore")
import torch, batchnorm as bn
x = torch.randn(8, 4)
compiled = torch.compile(bn.BatchNorm1d(4), fullgraph=True, backend="aot_eager")
torch.testing.assert_close(compiled(x), bn.BatchNorm1d(4)(x))
"""
    subprocess.run([sys.executable, "-c", code], check=True)


# How a name is looked up.


@pytest.fixture
def define(monkeypatch):
    """Define an accessor of some names as if it stood in the module."""

    def define(*paths, **options):
        def unknown():
            return "unknown"

        unknown.__module__ = torch_internals.__name__
        monkeypatch.setattr(torch_internals, "unknown", None, raising=False)
        monkeypatch.setitem(torch_internals.PATHS, "unknown", ())
        return lookup.accessor(*paths, **options)(unknown)

    return define


def test_the_object_found_replaces_the_accessor(define):
    accessor = define("torch.is_grad_enabled", probe=lambda found: found() is True)
    assert accessor() is True
    assert torch_internals.unknown is torch.is_grad_enabled
    assert accessor() is True


@pytest.mark.parametrize("path", ["torch.no_such_name", "torch.no_such_module.name"])
def test_a_missing_name_gives_the_safe_answer(define, path):
    assert define(path, probe=lambda found: True)() == "unknown"
    assert torch_internals.unknown() == "unknown"


@pytest.mark.parametrize("probe", [lambda found: False, lambda found: None, lambda found: 1 / 0])
def test_a_name_that_fails_its_probe_gives_the_safe_answer(define, probe):
    assert define("torch.is_grad_enabled", probe=probe)() == "unknown"


def test_a_name_is_looked_up_once(define):
    probed = []
    accessor = define("torch.is_grad_enabled", probe=lambda found: probed.append(found) or True)
    accessor()
    accessor()
    assert probed == [torch.is_grad_enabled]


def test_a_probe_does_not_see_the_modes_and_transforms_of_the_caller(define):
    class Doubling(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            pytest.fail("the mode of the caller sees the probe")

    def probe(found):
        return (torch.ones(1) + 1).item() == 2 and found() is True  # gradients are enabled

    accessor = define("torch.is_grad_enabled", probe=probe)
    with torch.no_grad(), Doubling():
        found = accessor()
    assert found is False
    assert torch_internals.unknown is torch.is_grad_enabled


# Predicates on both sides.


def test_transforms_and_forward_mode_are_noticed():
    told = []

    def function(x):
        told.append((torch_internals.may_be_transformed(), torch_internals.is_transformed()))
        return x * 1

    x = torch.ones(2)
    function(x)
    torch.func.vmap(function)(x)
    with torch.autograd.forward_ad.dual_level():
        function(x)
    assert told == [(False, False), (True, True), (True, True)]


def test_where_torch_does_not_tell_of_transforms_both_answers_are_safe(monkeypatch):
    monkeypatch.setattr(transforms, "transforms_are_active", lambda: True)
    monkeypatch.setattr(transforms, "FOUND", set())
    assert torch_internals.may_be_transformed()
    assert not torch_internals.is_transformed()


@compiles
def test_a_compiled_module_is_unwrapped():
    module = nn.Linear(1, 1)
    assert torch_internals.compiled_module(module) is None
    assert torch_internals.compiled_module(torch.compile(module)) is module


# Shortcuts of autograd.


def squares():
    class Square(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x * x

        @staticmethod
        def backward(ctx, dy):
            return 2 * ctx.saved_tensors[0] * dy

    return Square


def assert_it_squares(apply):
    x = torch.tensor([3.0], requires_grad=True)
    y = apply(x)
    assert y.grad_fn.name() == "SquareBackward"
    y.backward()
    assert (y.item(), x.grad.item()) == (9.0, 6.0)


def test_the_shortcuts_give_the_same_numbers_and_a_node_with_a_name():
    function = squares()
    apply = torch_internals.fast_apply(function)
    assert apply != function.apply
    assert_it_squares(apply)


@pytest.mark.parametrize("name", ["_raw_apply", "_shorten_backward"])
def test_a_shortcut_that_does_not_work_is_not_taken(monkeypatch, name):
    def changed(function):
        if name == "_shorten_backward":
            function._backward_cls.apply = lambda ctx, dy: (dy * 0, None, None)
        return lambda *arguments: arguments[0].detach()

    autograd._shortcuts.cache_clear()
    monkeypatch.setattr(autograd, name, changed)
    function = squares()
    before = function._backward_cls.apply
    apply = torch_internals.fast_apply(function)
    autograd._shortcuts.cache_clear()
    assert (apply == function.apply) == (name == "_raw_apply")
    assert (function._backward_cls.apply == before) == (name == "_shorten_backward")
    assert_it_squares(apply)
