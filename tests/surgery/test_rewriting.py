"""Forwards that accelerate writes: what they refuse, and the tools that copy, trace and compile them."""

import copy
import enum
import io
import pickle

import pytest
import torch
from torch import fx, nn
from torch.nn import functional as F

import batchnorm as bn
from batchnorm.surgery.acceleration.rewriting import restore_forwards
from steps_of_models import assert_same_training, train
from support import compiles, randn

X = (4, 3, 6, 6)


class Residual(nn.Module):
    """A block that a rewritten forward can do wrong in many ways."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv1, self.conv2 = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 3, padding=1)
        self.bn1, self.bn2 = nn.BatchNorm2d(3), nn.BatchNorm2d(3)
        self.relu = nn.ReLU(inplace=True)
        self.rate, self.sizes, self.function = 0.0, [1, 2], torch.relu

    def forward(self, x, scale=None, *, flag=False):
        """Return the output of the block."""
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.relu(self.bn2(self.conv2(y)) + x)
        if scale is not None:
            y = y * scale
        if self.rate > 0:
            y = F.dropout(y, self.rate, self.training)
        return x if flag else self.function(y) + sum(self.sizes)


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.Sequential(Residual(), Residual())

    def forward(self, x):
        return self.blocks(x).mean((2, 3))


def networks():
    """Return a network and its accelerated copy."""
    model = Network().double()
    fast, report = bn.accelerate(model)
    assert [row.after.count("+") for row in report.layers] == [1, 2, 1, 2]
    return model, fast


def test_blocks_keep_their_class_and_alike_ones_share_a_derived_one():
    _, fast = networks()
    first, second = fast.blocks
    assert isinstance(first, Residual)
    assert type(first) is type(second)
    assert type(first).__name__ == "Residual"
    assert type(first).forward.__doc__ == Residual.forward.__doc__


@pytest.mark.parametrize("argument", [{"scale": 2.0}, {"flag": True}], ids=str)
def test_a_call_with_other_optional_arguments_is_refused(argument):
    _, fast = networks()
    fast.blocks[0](randn(*X, dtype=torch.float64), scale=None, flag=False)
    with pytest.raises(bn.UnsupportedError, match=f"for {next(iter(argument))} = (None|False); got (2.0|True)"):
        fast.blocks[0](randn(*X, dtype=torch.float64), **argument)


CHANGES = {
    "rate": lambda block: setattr(block, "rate", 0.5),
    "sizes": lambda block: block.sizes.append(3),
    "function": lambda block: setattr(block, "function", torch.tanh),
    "the class of relu": lambda block: setattr(block, "relu", nn.SiLU()),
}


@pytest.mark.parametrize("name", CHANGES)
def test_an_attribute_that_has_changed_is_refused(name):
    _, fast = networks()
    CHANGES[name](fast.blocks[0])
    with pytest.raises(bn.UnsupportedError, match=f"wrote this forward of Residual for {name} = "):
        fast(randn(*X, dtype=torch.float64))


class Mode(str, enum.Enum):  # noqa: UP042 (as in libraries that were written before StrEnum)
    ADD = "add"
    SKIP = "skip"


@pytest.mark.parametrize("value", [Mode.ADD, float("inf"), torch.Size([1, 2])], ids=["enum", "infinity", "size"])
def test_an_attribute_whose_repr_is_no_code_is_compared(value):
    class Reads(Residual):
        def forward(self, x):
            y = self.bn2(self.conv2(x)) + x if self.value == value else x
            return self.relu(y)

    model = Reads().double()
    model.value = value
    fast, report = bn.accelerate(model)
    assert report.layers[-1].after == "BatchNorm2d + add + ReLU"
    assert_same_training(model, fast, randn(*X, dtype=torch.float64))
    fast.value = Mode.SKIP
    with pytest.raises(bn.UnsupportedError, match="wrote this forward of Reads for value = "):
        fast(randn(*X, dtype=torch.float64))


@pytest.mark.parametrize("inplace", [True, False])
def test_fold_takes_apart_what_was_fused(inplace):
    model, fast = networks()
    x = randn(*X, dtype=torch.float64)
    train(model, x), train(fast, x)
    folded, report = bn.fold(fast, inplace=inplace)
    assert [row.path for row in report.layers] == [name for name, _ in model.named_modules() if "bn" in name]
    torch.testing.assert_close(folded(x), model.eval()(x))
    assert (folded is fast) == inplace
    if not inplace:
        assert_same_training(model.train(), fast.train(), x)


def test_fold_refuses_an_accelerated_model_within_a_context():
    _, fast = networks()
    bn.add_domains(fast, ["a"])
    with bn.use_domain(fast, "a"), pytest.raises(bn.UnsupportedError, match="outside of use_domain"):
        bn.fold(fast)


def test_modules_that_are_still_called_may_be_replaced():
    model, fast = networks()
    for each in (model, fast):
        each.blocks[0].conv1 = nn.Conv2d(3, 3, 1).double()
        nn.init.ones_(each.blocks[0].conv1.weight)
        nn.init.zeros_(each.blocks[0].conv1.bias)
    assert_same_training(model, fast, randn(*X, dtype=torch.float64))


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save": lambda model: _saved_and_loaded(model),
    "fx": fx.symbolic_trace,
    "fx, then pickle": lambda model: pickle.loads(pickle.dumps(fx.symbolic_trace(model))),
}


def _saved_and_loaded(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("way", COPIES)
def test_a_copy_trains_alike(way):
    model, fast = networks()
    assert_same_training(model, COPIES[way](fast), randn(*X, dtype=torch.float64))


def test_the_state_dict_loads_both_ways():
    model, fast = networks()
    model.load_state_dict(fast.state_dict())
    fast.load_state_dict(model.state_dict())


@compiles
@pytest.mark.parametrize("training", [True, False])
def test_torch_compile_takes_the_whole_graph(training):
    model, fast = networks()
    x = randn(*X, dtype=torch.float64)
    compiled = torch.compile(fast.train(training), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), model.train(training)(x), rtol=1e-9, atol=1e-9)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("training", [True, False])
def test_torch_export_takes_the_model(training):
    model, fast = networks()
    x = randn(*X, dtype=torch.float64)
    program = torch.export.export(fast.train(training), (x,))
    torch.testing.assert_close(program.module()(x), model.train(training)(x), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("inplace", [True, False])
def test_to_torch_takes_apart_what_was_fused(inplace):
    model, fast = networks()
    state = copy.deepcopy(fast)
    stock, report = bn.to_torch(fast, inplace=inplace)
    assert not any(isinstance(module, bn.BatchNorm2d) for module in stock.modules())
    assert {row.after for row in report.layers} == {"BatchNorm2d"}
    assert_same_training(model, stock, randn(*X, dtype=torch.float64))
    if not inplace:
        assert_same_training(state, fast, randn(*X, dtype=torch.float64))


def test_restored_forwards_apply_activations_themselves():
    model, fast = networks()
    restore_forwards(fast)
    assert type(fast.blocks[0]) is Residual
    assert_same_training(model, fast, randn(*X, dtype=torch.float64))


def test_the_written_lines_stand_in_tracebacks():
    _, fast = networks()
    with pytest.raises(RuntimeError) as raised:
        fast(randn(4, 2, 6, 6, dtype=torch.float64))
    assert "self.conv1(x)" in str(raised.getrepr(chain=False))


def test_a_block_that_reads_an_object_keeps_its_forward():
    class Reads(Residual):
        def __init__(self):
            super().__init__()
            self.config = {"relu": True}

        def forward(self, x):
            y = F.relu(self.bn1(self.conv1(x))) if self.config["relu"] else x
            return self.bn2(y)

    fast, report = bn.accelerate(Reads().double())
    assert report.left[0].reason == "its forward reads config, a dict, which may change unnoticed"
    fast.config["relu"] = False
    train(fast, randn(*X, dtype=torch.float64))
