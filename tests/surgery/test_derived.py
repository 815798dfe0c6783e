"""`derive`: a class for one module, with some of the methods of its own class replaced."""

import copy
import gc
import pickle
from dataclasses import dataclass

import pytest
import torch
from torch import fx, nn
from torch.nn.utils import parametrizations

from batchnorm.surgery.derived import derive, own_class
from support import compiles, randn, saved_and_loaded

pytestmark = pytest.mark.filterwarnings(r"ignore:.*torch\.jit\.\w+. is deprecated")


@dataclass(frozen=True)
class Scaled:
    """Multiplies what the forward of a module returns."""

    factor: float

    def __call__(self, own):
        factor = self.factor

        def forward(self, x):
            return own.forward(self, x) * factor

        return {"forward": forward}


def loud(own):
    """Let a module say that it changes its mode."""

    def train(self, mode=True):
        self.said = mode
        return own.train(self, mode)

    return {"train": train}


class Block(nn.Module):
    """Two layers and a skip connection."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x):
        """Return the sum of x and what the layers make of it."""
        return x + self.second(self.first(x).relu())


SUBCLASSES = []


class Listed(nn.Module):
    """A class whose subclasses are listed, and need an argument for it."""

    def __init_subclass__(cls, name):
        SUBCLASSES.append(name)


class Stateful(nn.Module):
    """A module with rules of its own for pickles and copies."""

    def __init__(self):
        super().__init__()
        self.secret = 1

    def __getstate__(self):
        return {**self.__dict__, "secret": 2}

    def __setstate__(self, state):
        super().__setstate__(state)
        self.secret *= 10

    def forward(self, x):
        return x + self.secret


def doubled():
    torch.manual_seed(0)
    module = Block()
    derive(module, Scaled(2.0))
    return module


def test_the_module_keeps_its_kind_its_names_and_its_attributes():
    plain, module = Block(), Block()
    before = vars(module)
    derive(module, Scaled(2.0))
    assert isinstance(module, Block)
    assert vars(module) is before
    for name in ("__name__", "__qualname__", "__module__", "__doc__"):
        assert getattr(type(module), name) == getattr(Block, name)
    assert repr(module) == repr(plain)
    assert own_class(module) is own_class(plain) is Block
    assert type(plain) is Block


def test_the_method_is_replaced_for_the_one_module_alone():
    module, x = doubled(), randn(4, 3)
    plain = Block()
    plain.load_state_dict(module.state_dict())
    assert torch.equal(module(x), plain(x) * 2)


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, copy.copy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "copy", "pickle"]
)
def test_a_copy_computes_the_same_and_is_of_the_own_class_too(copied):
    module, x = doubled(), randn(4, 3)
    twin = copied(module)
    assert torch.equal(twin(x), module(x))
    assert type(twin) is type(module)
    assert own_class(twin) is Block


def test_torch_saves_and_loads_the_whole_module():
    module, x = nn.Sequential(doubled(), nn.ReLU()), randn(4, 3)
    assert torch.equal(saved_and_loaded(module, weights_only=False)(x), module(x))


def test_two_changes_add_up_in_copies_too():
    module, x = doubled(), randn(4, 3)
    y = module(x)
    derive(module, Scaled(5.0))
    derive(module, loud)
    for each in (module, copy.deepcopy(module), saved_and_loaded(module, weights_only=False)):
        torch.testing.assert_close(each(x), y * 5, rtol=1e-6, atol=0)
        each.eval()
        assert each.said is False
        assert not each.first.training
        assert own_class(each) is Block


def test_modules_with_equal_changes_share_a_class():
    first, second, other = doubled(), doubled(), Block()
    derive(other, Scaled(3.0))
    assert type(first) is type(second) is not type(other)


def test_a_derived_class_goes_with_its_last_module():
    module = Block()
    derive(module, Scaled(7.0))
    del module
    gc.collect()
    assert [each for each in Block.__subclasses__() if each._changes == (Scaled(7.0),)] == []


def test_no_registry_of_subclasses_learns_of_the_class():
    module = Listed()
    derive(module, loud)
    assert SUBCLASSES == []
    module.train()
    assert module.said


def test_rules_for_pickles_and_copies_of_the_own_class_are_kept():
    plain, module, x = Stateful(), Stateful(), torch.zeros(1)
    derive(module, Scaled(2.0))
    for copied in (copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))):
        assert copied(plain)(x) == 20
        assert copied(module)(x) == 40


def test_a_parametrized_module_is_copied_with_its_change():
    module, x = nn.Linear(3, 3), randn(4, 3)
    parametrizations.weight_norm(module)
    y = module(x)
    derive(module, Scaled(2.0))
    assert torch.equal(copy.deepcopy(module)(x), y * 2)


def test_a_parametrization_can_be_added_to_a_derived_class():
    module, x = nn.Linear(3, 3), randn(4, 3)
    derive(module, Scaled(2.0))
    y = module(x)
    parametrizations.weight_norm(module)
    torch.testing.assert_close(module(x), y)
    torch.testing.assert_close(copy.deepcopy(module)(x), y)


def test_a_graph_module_is_copied_pickled_and_recompiled_with_its_change():
    module, x = fx.symbolic_trace(Block()), randn(4, 3)
    y = module(x)
    derive(module, loud)
    for each in (copy.deepcopy(module), saved_and_loaded(module, weights_only=False), module):
        assert torch.equal(each(x), y)
        each.eval()
        assert each.said is False
        each.recompile()
        assert torch.equal(each(x), y)


def test_torch_fx_traces_the_new_forward_and_the_block_around_it():
    module, x = nn.Sequential(doubled()), randn(4, 3)
    traced = fx.symbolic_trace(module)
    assert torch.equal(traced(x), module(x))
    assert {node.target for node in traced.graph.nodes if node.op == "call_module"} == {"0.first", "0.second"}


def test_torch_jit_traces_the_new_forward():
    module, x = doubled(), randn(4, 3)
    assert torch.equal(torch.jit.trace(module, x)(x), module(x))


def test_torch_jit_scripts_a_module_whose_forward_is_its_own():
    module, x = Block(), randn(4, 3)
    y = module(x)
    derive(module, loud)
    assert torch.equal(torch.jit.script(module)(x), y)


def test_torch_exports_the_new_forward():
    module, x = doubled(), randn(4, 3)
    torch.testing.assert_close(torch.export.export(module, (x,)).module()(x), module(x))


@compiles
def test_torch_compiles_the_new_forward():
    module, x = doubled(), randn(4, 3)
    torch.testing.assert_close(torch.compile(module, fullgraph=True)(x), module(x))
