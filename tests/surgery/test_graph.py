"""Who feeds whom in a model: steps, their sources and their uses, across the borders of blocks."""

import copy
import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

import batchnorm as bn
from batchnorm.surgery.graph import Step, Unknown, read_dataflow
from support import assert_same_state, copied_state, randn


class ConvNormAct(nn.Module):
    def __init__(self, channels=3, act=nn.ReLU):
        super().__init__()
        self.conv, self.norm, self.act = nn.Conv2d(channels, channels, 1), nn.BatchNorm2d(channels), act()

    def forward(self, x):
        return self.act(self.norm(self.conv(x)))


class Residual(nn.Module):
    """A residual block whose last normalization is in a block of its own."""

    def __init__(self):
        super().__init__()
        self.first, self.last, self.relu = ConvNormAct(), ConvNormAct(act=nn.Identity), nn.ReLU()

    def forward(self, x):
        y = self.last(self.first(x))
        y += x
        return self.relu(y)


class Stage(nn.Module):
    """A block that never calls the nn.Sequential of its layers as a whole."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(ConvNormAct(), ConvNormAct())

    def forward(self, x=None):
        for layer in self.layers:
            x = layer(x)
        return x


def kinds(flow, found):
    """Return what steps call: the class of the module, the name of the function, or the reason."""
    found = found if isinstance(found, list) else [found]
    names = []
    for step in found:
        if isinstance(step, Unknown):
            names.append(step.reason)
        elif flow.module(step) is not None:
            names.append(flow.path(flow.module(step)))
        else:
            names.append(getattr(step.node.target, "__name__", step.node.target))
    return names


def around(model, module, example=None):
    """Return the source and the uses of the single call of a module."""
    flow = read_dataflow(model, example)
    assert flow.why_no_single_call(module) == ""
    (step,) = flow.calls(module)
    return kinds(flow, flow.source(step)), kinds(flow, flow.uses(step))


# Steps within a block.


def test_a_sequential_is_read_in_its_order():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU())
    assert around(model, model[1]) == (["0"], ["2"])
    assert around(model, model[0]) == (["it is the input of the model"], ["1"])
    assert around(model, model[2]) == (["1"], ["output"])


def test_a_graph_module_is_read():
    model = torch.fx.symbolic_trace(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU()))
    assert around(model, model.get_submodule("1")) == (["0"], ["2"])


def test_functions_and_methods_are_steps():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.BatchNorm1d(3), nn.BatchNorm1d(3)

        def forward(self, x):
            return F.relu(self.a(x.flatten(1))) + self.b(torch.tanh(x)).relu_()

    model = Model()
    assert around(model, model.a) == (["flatten"], ["relu"])
    assert around(model, model.b) == (["tanh"], ["relu_"])


def test_reading_a_shape_is_no_use():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

        def forward(self, x):
            y = self.conv(x)
            z = self.norm(y)
            return z.reshape(y.shape[0], y.size(1), -1).to(y.dtype)

    model = Model()
    assert around(model, model.norm) == (["conv"], ["reshape"])
    assert around(model, model.conv)[1] == ["norm"]


def test_all_uses_of_a_value_are_found():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.a, self.b = nn.BatchNorm1d(3), nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x):
            y = self.norm(x)
            return self.a(y) + self.b(y), y

    model = Model()
    assert around(model, model.norm)[1] == ["a", "b", "output"]


def test_a_weight_that_a_forward_reads_is_a_step():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.norm = nn.Linear(3, 3), nn.BatchNorm1d(3)

        def forward(self, x):
            return F.linear(self.norm(self.linear(x)), self.linear.weight)

    flow = read_dataflow(Tied())
    assert [node.target for node in flow.blocks[""].graph.nodes if node.op == "get_attr"] == ["linear.weight"]


def test_layers_with_weights_are_steps_whatever_they_have_inside():
    layer = parametrizations.weight_norm(nn.Linear(3, 3))
    model = nn.Sequential(layer, nn.BatchNorm1d(3), nn.MultiheadAttention(4, 2))
    assert around(nn.Sequential(*model[:2]), model[1]) == (["0"], ["output"])
    assert read_dataflow(model).unread == {}


# Across the borders of blocks.


def test_sources_and_uses_cross_blocks_and_identities():
    model = nn.Sequential(nn.Identity(), Residual(), nn.Sequential(), ConvNormAct())
    assert around(model, model[1].last.norm) == (["1.last.conv"], ["iadd"])  # not "add": it changes a tensor
    assert around(model, model[1].first.conv) == (["it is the input of the model"], ["1.first.norm"])
    assert around(model, model[1].first.act) == (["1.first.norm"], ["1.last.conv"])
    assert around(model, model[1].relu) == (["iadd"], ["3.conv"])
    assert around(model, model[3].conv)[0] == ["1.relu"]


def test_arguments_by_name_and_constants_cross_blocks():
    class Gate(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(3)

        def forward(self, x, other=None, scale=1.0, *, twice=False):
            y = self.norm(x if other is None else other)
            return y * scale if twice else y

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.linear = Gate(), Gate(), nn.Linear(3, 3)

        def forward(self, x):
            return self.a(x), self.b(x, other=self.linear(x), scale=2.0, twice=True)

    model = Model()
    assert around(model, model.a.norm)[0] == ["it is the input of the model"]
    assert around(model, model.b.norm) == (["linear"], ["mul"])
    flow = read_dataflow(model)
    assert flow.blocks["b"].constants == {"scale": 2.0, "twice": True}
    assert flow.blocks["a"].constants == {"other": None, "scale": 1.0, "twice": False}


def test_a_block_called_twice_is_no_single_call_of_its_modules():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = ConvNormAct()

        def forward(self, x):
            return self.inner(self.inner(x))

    model = Model()
    flow = read_dataflow(model)
    assert flow.why_no_single_call(model.inner.norm) == "inner is called 2 times"
    assert kinds(flow, flow.source(flow.calls(model.inner.conv)[0])) == ["inner is called 2 times"]
    assert kinds(flow, flow.uses(flow.calls(model.inner.act)[0])) == ["inner is called 2 times"]


def test_a_module_used_twice_and_one_never_called_say_so():
    norm = nn.BatchNorm1d(3)
    model = nn.Sequential(nn.Linear(3, 3), norm, nn.Linear(3, 3), norm)
    model.spare = nn.ModuleList([nn.BatchNorm1d(3)])
    flow = read_dataflow(model)
    assert flow.why_no_single_call(norm) == "it is called 2 times"
    del model.spare

    class Unused(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(3)

        def forward(self, x):
            return x

    model = Unused()
    assert read_dataflow(model).why_no_single_call(model.norm) == "no forward calls norm"


def test_hooks_on_a_block_end_the_search():
    model = nn.Sequential(nn.Sequential(nn.Conv2d(3, 3, 1)), nn.BatchNorm2d(3))
    model[0].register_forward_hook(lambda module, args, output: output * 2)
    assert around(model, model[1])[0] == ["there are hooks on 0"]
    assert around(model, model[0][0])[1] == ["there are hooks on 0"]


def test_values_among_several_are_not_followed():
    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(3)

        def forward(self, pair):
            return self.norm(pair[0]), pair[1]

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.pair = nn.Linear(3, 3), Pair()

        def forward(self, x):
            return self.pair((self.linear(x), x))[0]

    model = Model()
    assert around(model, model.pair.norm)[1] == ["pair returns it among several values"]
    assert around(model, model.linear)[1] == ["pair is given it among several values"]


def test_a_sequential_that_a_forward_iterates_over_is_not_called_itself():
    model = nn.Sequential(Stage())
    assert around(model, model[0].layers[1].norm) == (["0.layers.1.conv"], ["0.layers.1.act"])
    assert "0.layers" not in read_dataflow(model).blocks
    model = Stage()  # whose forward has defaults alone
    assert around(model, model.layers[0].conv)[0] == ["it is the input of the model"]


def test_a_sequential_of_an_unread_model_that_is_iterated_over_is_not_called():
    class Root(nn.Module):
        def __init__(self):
            super().__init__()
            self.stage, self.head = Stage(), nn.Sequential(ConvNormAct())

        def forward(self, x):
            return self.head(self.stage(x)) if x.sum() > 0 else x

    model = Root()
    assert around(model, model.stage.layers[0].norm) == (["stage.layers.0.conv"], ["stage.layers.0.act"])
    assert around(model, model.head[0].norm) == (["head.0.conv"], ["head.0.act"])


# Blocks that cannot be read.


class Branching(nn.Module):
    """A model whose path depends on its values."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.inner = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), ConvNormAct()

    def forward(self, x):
        x = self.norm(self.conv(x))
        x = x.relu() if x.sum() > -1e9 else x
        return self.inner(x)


def test_a_block_that_cannot_be_traced_has_a_reason_and_the_others_are_read():
    model = Branching()
    flow = read_dataflow(model)
    assert "torch.fx cannot trace Branching: TraceError: symbolically traced variables" in flow.unread[""]
    assert "Branching cannot be read: torch.fx cannot trace" in flow.why_no_single_call(model.norm)
    assert around(model, model.inner.norm) == (["inner.conv"], ["inner.act"])
    (source,) = kinds(flow, flow.source(flow.calls(model.inner.conv)[0]))
    assert source.startswith("it crosses the border of inner, and Branching cannot be read")


def test_an_example_reads_what_tracing_cannot():
    model, x = Branching(), randn(2, 3, 4, 4)
    assert around(model, model.norm, x) == (["conv"], ["sum", "relu"])
    assert around(model, model.inner.conv, x) == (["relu"], ["inner.norm"])
    (note,) = read_dataflow(model).notes()
    assert note.startswith("One block could not be traced; an example may help")
    flow = read_dataflow(model, x)
    assert flow.unread == {}
    assert flow.notes() == ()
    assert "cannot trace Branching" in flow.blocks[""].reason_against_code


def test_an_example_may_be_a_tuple_or_a_mapping():
    class Two(Branching):
        def forward(self, x, other=None):
            return super().forward(x) if other is None else super().forward(x) + self.conv(other)

    model, x = Two(), randn(2, 3, 4, 4)
    for example in ((x, x), {"x": x, "other": x}):
        assert read_dataflow(model, example).why_no_single_call(model.conv) == "it is called 2 times on the example"


@pytest.mark.parametrize("example", [None, torch.zeros(2, 3)])
def test_steps_that_depend_on_the_mode_are_refused(example):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.norm = nn.Linear(3, 3), nn.BatchNorm1d(3)

        def forward(self, x):
            x = self.linear(x)
            return self.norm(x if self.training else x + 1)

    (reason,) = read_dataflow(Model(), example).unread.values()
    assert "Model computes otherwise in training than in eval" in reason
    assert example is None or "its calls on the example, in training and in eval, differ" in reason


def test_a_failing_example_is_a_reason():
    reason = read_dataflow(Branching(), torch.zeros(2, 4, 5, 5)).unread[""]
    assert "the model fails on the example in eval mode: RuntimeError" in reason


def test_calls_with_other_arguments_are_refused():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = self.Inner()

        class Inner(nn.Module):
            def __init__(self):
                super().__init__()
                self.norm = nn.BatchNorm1d(3)

            def forward(self, x, flag=True):
                return self.norm(x)

        def forward(self, x):
            return self.block(self.block(x), flag=False)

    model = Model()
    assert "it is called with x and with x, flag" in read_dataflow(model).why_no_single_call(model.block.norm)


def test_a_forward_set_on_the_module_is_refused():
    model = nn.Sequential(ConvNormAct())
    model[0].forward = lambda x: x
    assert "was set on the ConvNormAct itself" in read_dataflow(model).why_no_single_call(model[0].norm)


def test_a_block_that_branches_at_random_is_refused():
    class Skipping(nn.Module):
        def __init__(self, draw):
            super().__init__()
            self.norm, self.draw = nn.BatchNorm1d(3), draw

        def forward(self, x):
            return self.norm(x) if self.draw() < 2 else x

    for draw in (random.random, np.random.rand, lambda: torch.rand(1).item()):
        (reason,) = read_dataflow(Skipping(draw)).unread.values()
        assert reason == "the forward of Skipping draws random numbers outside of its graph"


def test_a_module_that_an_unread_block_has_too_is_no_single_call():
    class Unread(nn.Module):
        def __init__(self, norm):
            super().__init__()
            self.norm = norm

        def forward(self, x):
            return self.norm(x) if x.sum() > 0 else x

    inner = ConvNormAct()
    norm = inner.norm
    for shared in (norm, inner):
        model = nn.Sequential(inner, Unread(shared))
        why = read_dataflow(model).why_no_single_call(norm)
        assert why.startswith("1, which has it too, cannot be read: torch.fx cannot trace Unread")


def test_a_forward_that_counts_in_a_buffer_does_not_count_while_it_is_read():
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(3)
            self.register_buffer("seen", torch.zeros(()))

        def forward(self, x):
            self.seen += 1
            return self.norm(x)

    model = Counting()
    flow = read_dataflow(model)
    assert float(model.seen) == 0
    assert flow.blocks[""].reason_against_code == "the forward of Counting sets attributes"


# Graphs of which code can be made.


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda self, x: F.leaky_relu(x, 0.1 if self.training else 0.2), "other constants in training than in eval"),
        (lambda self, x: setattr(self, "seen", x) or x, "sets attributes"),
        (lambda self, x: self.kept.append(x) or x, "sets attributes"),
    ],
    ids=["slope", "attribute", "list"],
)
def test_blocks_whose_code_would_differ_are_read_but_not_rewritten(change, reason):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.norm, self.kept = nn.Linear(3, 3), nn.BatchNorm1d(3), []

        def forward(self, x):
            return change(self, self.norm(self.linear(x)))

    model = Model()
    flow = read_dataflow(model)
    assert reason in flow.blocks[""].reason_against_code
    assert kinds(flow, flow.source(flow.calls(model.norm)[0])) == ["linear"]
    assert vars(model)["kept"] == []
    assert "seen" not in vars(model)


def test_a_function_that_is_told_the_mode_reads_it_in_the_graph():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(3)

        def forward(self, x):
            x = F.dropout(self.norm(x), 0.5, self.training)
            return F.dropout(x, 0.5, training=self.training, inplace=False)

    block = read_dataflow(Model()).blocks[""]
    assert block.reason_against_code == ""
    code = block.graph.python_code("self").src
    assert code.count("self.training") == 1
    assert code.count("training = training") == 2


def test_a_value_kept_as_an_attribute_is_a_use_that_is_not_known():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.norm = nn.Linear(3, 3), nn.BatchNorm1d(3)

        def forward(self, x):
            self.features = self.linear(x)
            return self.norm(self.features)

    model = Model()
    assert around(model, model.linear)[1] == ["the forward of Model keeps it as an attribute", "norm"]


def test_contexts_that_torch_fx_does_not_record_are_named():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(3)

        def forward(self, x):
            return self.inner(x)

        def inner(self, x):
            with torch.autocast("cpu", enabled=False):
                return self.norm(x)

    assert "the forward of Model uses autocast" in read_dataflow(Model()).blocks[""].reason_against_code


# The model stays as it is.


@pytest.mark.parametrize("example", [None, randn(2, 3, 4, 4)], ids=["traced", "recorded"])
def test_reading_leaves_the_model_as_it_is(example):
    class Noisy(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm2d(3)

        def forward(self, x):
            return self.norm(x) + torch.rand_like(x) + torch.rand(1)

    model = nn.Sequential(Residual(), Branching(), Noisy())
    model[0].eval()
    before, modes = copied_state(model), [module.training for module in model.modules()]
    attributes = [copy.copy(vars(module)) for module in model.modules()]
    state = torch.random.get_rng_state()
    read_dataflow(model, example)
    assert_same_state(dict(model.state_dict()), before)
    assert [module.training for module in model.modules()] == modes
    assert [vars(module).keys() for module in model.modules()] == [each.keys() for each in attributes]
    assert torch.equal(torch.random.get_rng_state(), state)
    assert sum(len(module._forward_hooks) for module in model.modules()) == 0


def test_layers_of_ours_are_steps_in_both_ways_of_reading():
    model = nn.Sequential(nn.Conv2d(3, 3, 1), bn.BatchNorm2d(3, activation="relu"), Branching())
    for example in (None, randn(2, 3, 4, 4)):
        assert around(model, model[1], example)[0] == ["0"]


def test_tracing_and_recording_agree():
    """Torch calls ``y += x`` by the name of its method."""

    class Twin(Residual):
        def forward(self, x):
            return super().forward(x) if len(x) else x

    traced, recorded = Residual(), Twin()
    x = randn(2, 3, 4, 4)
    flows = read_dataflow(traced), read_dataflow(recorded, x)
    assert "cannot trace Twin" in flows[1].blocks[""].reason_against_code
    for path, module in traced.named_modules():
        if flows[0].calls(module):
            steps = [
                flow.calls(model.get_submodule(path))[0] for flow, model in zip(flows, (traced, recorded), strict=True)
            ]
            found = [
                (kinds(flow, flow.source(s)), kinds(flow, flow.uses(s))) for flow, s in zip(flows, steps, strict=True)
            ]
            assert str(found[0]).replace("iadd", "add_") == str(found[1]), path
    assert isinstance(flows[1].source(flows[1].calls(recorded.relu)[0]), Step)
