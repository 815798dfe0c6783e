"""The layers where models are copied, moved, saved, built without memory, traced and averaged, as torch's are."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn.utils import parametrize, prune
from torch.optim.swa_utils import AveragedModel, update_bn

import batchnorm as bn
from support import assert_same_state, saved_and_loaded

SHAPES = {bn.BatchNorm1d: (6, 3, 4), bn.BatchNorm2d: (6, 3, 4, 2), bn.BatchNorm3d: (6, 3, 2, 4, 2)}


def trained(layer, shape=(8, 3, 4, 2)):
    generator = torch.Generator().manual_seed(2)
    for _ in range(3):
        layer(torch.randn(shape, generator=generator) * 3 + 2)
    return layer


# Saving and loading.


@pytest.mark.parametrize("kind", [bn.BatchNorm2d, nn.BatchNorm2d])
def test_a_saved_state_dict_loads_with_weights_only_into_ours_and_torchs(kind):
    layer = trained(bn.BatchNorm2d(3, activation="relu"))
    state = saved_and_loaded(layer.state_dict(), weights_only=True)
    fresh = kind(3)
    fresh.load_state_dict(state, strict=True)
    assert_same_state(fresh.state_dict(), layer.state_dict())


def test_a_saved_state_dict_of_torchs_loads_with_weights_only_into_ours():
    theirs, ours = trained(nn.BatchNorm2d(3)), bn.BatchNorm2d(3)
    ours.load_state_dict(saved_and_loaded(theirs.state_dict(), weights_only=True), strict=True)
    assert_same_state(ours.state_dict(), theirs.state_dict())


def test_a_whole_saved_layer_goes_on_as_the_layer_does():
    layer = trained(bn.BatchNorm2d(3, activation="gelu", momentum=0.3))
    twin, x = saved_and_loaded(layer, weights_only=False), torch.randn(4, 3, 2, 2)
    assert torch.equal(twin(x), layer(x))
    assert_same_state(twin.state_dict(), layer.state_dict())


def test_a_model_nested_deep_loads_torchs_state_strictly():
    def model(of):
        return nn.Sequential(nn.Conv2d(2, 3, 1), nn.Sequential(nn.ModuleDict({"norm": of.BatchNorm2d(3)})))

    theirs, ours = model(nn), model(bn)
    trained(theirs[1][0]["norm"])
    ours.load_state_dict(theirs.state_dict(), strict=True)
    assert_same_state(ours.state_dict(), theirs.state_dict())


def test_assign_takes_the_tensors_of_the_state_dict_themselves():
    state, layer = trained(bn.BatchNorm2d(3)).state_dict(), bn.BatchNorm2d(3)
    layer.load_state_dict(state, assign=True)
    assert {name: value.data_ptr() for name, value in layer.state_dict().items()} == {
        name: value.data_ptr() for name, value in state.items()
    }


def test_half_precision_statistics_that_are_assigned_become_float32():
    state = {
        name: value.bfloat16() if value.is_floating_point() else value
        for name, value in trained(nn.BatchNorm2d(3)).state_dict().items()
    }
    layer = bn.BatchNorm2d(3)
    layer.load_state_dict(state, assign=True)
    assert (layer.weight.dtype, layer.running_mean.dtype) == (torch.bfloat16, torch.float32)
    assert torch.equal(layer.running_mean, state["running_mean"].float())


# Without memory: the meta device, skip_init, to_empty, fake tensors.


@pytest.mark.parametrize("mode", [True, False])
@pytest.mark.parametrize("kind", SHAPES)
def test_a_layer_on_the_meta_device_gives_outputs_and_gradients_there(kind, mode):
    layer, x = kind(3, device="meta", activation="silu").train(mode), torch.empty(SHAPES[kind], device="meta")
    x.requires_grad_()
    y = layer(x, residual=torch.empty_like(x))
    y.sum().backward()
    assert y.is_meta
    assert y.shape == x.shape == x.grad.shape
    assert layer.weight.grad.is_meta


def test_all_of_a_layer_built_in_the_meta_context_is_meta():
    with torch.device("meta"):
        layer = bn.BatchNorm2d(3)
    assert all(tensor.is_meta for tensor in [*layer.parameters(), *layer.buffers()])


def made_on_meta():
    return bn.BatchNorm2d(3, device="meta").to_empty(device="cpu")


def made_by_skip_init():
    return nn.utils.skip_init(bn.BatchNorm2d, 3)


def made_and_emptied():
    return bn.BatchNorm2d(3).to_empty(device="cpu")


@pytest.mark.parametrize("made", [made_on_meta, made_by_skip_init, made_and_emptied])
@pytest.mark.usefixtures("filled_empties")
def test_an_empty_layer_that_loads_a_state_goes_on_as_the_one_it_is_of(made):
    source, layer, x = trained(bn.BatchNorm2d(3)), made(), torch.randn(4, 3, 2, 2)
    layer.load_state_dict(source.state_dict())
    assert torch.equal(layer(x), source(x))
    assert_same_state(layer.state_dict(), source.state_dict())


@pytest.mark.parametrize("made", [made_on_meta, made_by_skip_init, made_and_emptied])
@pytest.mark.usefixtures("filled_empties")
def test_an_empty_layer_that_loads_a_state_has_skipped_no_batch(made):
    layer = made()
    layer.load_state_dict(bn.BatchNorm2d(3).state_dict())
    assert int(layer.skipped_batches) == 0


def test_a_meta_layer_trains_on_after_a_state_is_assigned():
    source, layer, x = trained(bn.BatchNorm2d(3)), bn.BatchNorm2d(3, device="meta"), torch.randn(4, 3, 2, 2)
    layer.load_state_dict(copy.deepcopy(source.state_dict()), assign=True)
    assert torch.equal(layer(x), source(x))
    assert_same_state(layer.state_dict(), source.state_dict())
    assert int(layer.skipped_batches) == 0


@pytest.mark.usefixtures("filled_empties")
def test_skip_init_takes_the_options_and_resets_to_a_new_layer():
    layer = nn.utils.skip_init(bn.BatchNorm2d, 3, activation="relu")
    layer.reset_parameters()
    assert layer.activation == "relu"
    assert_same_state(layer.state_dict(), nn.BatchNorm2d(3).state_dict())


@pytest.mark.parametrize("mode", [True, False])
@pytest.mark.parametrize("kind", SHAPES)
def test_fake_tensors_give_fake_outputs_and_gradients(kind, mode):
    with FakeTensorMode():
        layer, x = kind(3, activation="tanh").train(mode), torch.randn(SHAPES[kind], requires_grad=True)
        y = layer(x, residual=torch.randn(SHAPES[kind]))
        y.sum().backward()
    assert isinstance(y, FakeTensor)
    assert isinstance(layer.weight.grad, FakeTensor)
    assert y.shape == x.grad.shape == torch.Size(SHAPES[kind])


def test_a_fake_batch_leaves_the_real_statistics_as_they_were():
    layer = trained(bn.BatchNorm2d(3))
    before = copy.deepcopy(layer.state_dict())
    with FakeTensorMode(allow_non_fake_inputs=True):
        layer(torch.randn(4, 3, 2, 2))
    assert_same_state(layer.state_dict(), before)


# Moving.


def test_to_where_a_model_is_already_keeps_its_tensors():
    model = nn.Sequential(bn.BatchNorm2d(3))
    before = [*model.parameters(), *model.buffers()]
    model.to("cpu", torch.float32)
    assert all(new is old for new, old in zip([*model.parameters(), *model.buffers()], before, strict=True))


def test_a_layer_of_two_names_stays_one_layer_through_a_cast():
    layer = bn.BatchNorm2d(3)
    model = nn.Sequential(layer, layer).to(torch.float64)
    model(torch.randn(4, 3, 2, 2, dtype=torch.float64))
    assert model[0] is model[1]
    assert model[0].running_mean.dtype == torch.float64
    assert int(layer.num_batches_tracked) == 2


def test_a_cast_to_half_precision_keeps_the_statistics_memory():
    layer = trained(bn.BatchNorm2d(3))
    seen_elsewhere = layer.running_mean
    layer.bfloat16()(torch.randn(4, 3, 2, 2, dtype=torch.bfloat16) + 9)
    assert torch.equal(layer.running_mean, seen_elsewhere)


def test_shared_memory_holds_every_buffer():
    layer = bn.BatchNorm2d(3).share_memory()
    assert all(tensor.is_shared() for tensor in [*layer.parameters(), *layer.buffers()])


# The tracer of torch.fx.


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Sequential(nn.Conv1d(3, 3, 1), nn.ModuleDict({"norm": bn.BatchNorm1d(3, activation="relu")}))
        self.twice = bn.BatchNorm(3, channel_dim=-1)

    def forward(self, x, mask):
        y = self.inner[1]["norm"](self.inner[0](x), residual=x, mask=mask)
        y = self.twice(y.transpose(1, 2), mask=mask)
        return self.twice(y, None, mask).transpose(1, 2)


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = bn.BatchNorm1d(3)
        self.blocks = nn.ModuleList([Block(), nn.ModuleList([Block()])])

    def forward(self, x, mask):
        x = self.first(x)
        return self.blocks[1][0](self.blocks[0](x, mask), mask)


@pytest.mark.parametrize("mode", [True, False], ids=["train", "eval"])
def test_the_stock_tracers_graph_equals_the_model(mode):
    model = Network()
    mask = bn.lengths_to_mask(torch.tensor([5, 3, 1, 4]), 5)
    model(torch.randn(4, 3, 5) + 1, mask)
    traced = torch.fx.symbolic_trace(copy.deepcopy(model).train(mode))
    model.train(mode)
    for _ in range(2):
        x = torch.randn(4, 3, 5) * 2 + 1
        assert torch.equal(traced(x, mask), model(x, mask))
    assert_same_state(traced.state_dict(), model.state_dict())


def test_the_stock_tracer_makes_each_call_of_a_layer_one_node():
    model = Network()
    nodes = torch.fx.symbolic_trace(model).graph.nodes
    called = [node.target for node in nodes if node.op == "call_module"]
    block = ["inner.1.norm", "twice", "twice"]
    expected = ["first", *(f"blocks.0.{name}" for name in block), *(f"blocks.1.0.{name}" for name in block)]
    assert [target for target in called if not isinstance(model.get_submodule(target), nn.Conv1d)] == expected


def test_a_trace_in_training_gives_the_models_gradients():
    model, x, mask = Network(), torch.randn(4, 3, 5), torch.ones(4, 5, dtype=torch.bool)
    traced = torch.fx.symbolic_trace(copy.deepcopy(model))
    traced(x, mask).square().sum().backward()
    model(x, mask).square().sum().backward()
    gradients = {name: parameter.grad for name, parameter in traced.named_parameters()}
    assert_same_state(gradients, {name: parameter.grad for name, parameter in model.named_parameters()})


class Doubled(bn.BatchNorm1d):
    def forward(self, x, residual=None):
        return super().forward(x, residual) * 2


class Shifted(Doubled):
    def forward(self, x):
        return super().forward(x, residual=x) + 1


@pytest.mark.parametrize("mode", [True, False], ids=["train", "eval"])
def test_a_trace_of_a_subclass_runs_its_forward_once(mode):
    model = nn.Sequential(bn.BatchNorm1d(3), nn.Sequential(Shifted(3), Doubled(3)))
    traced = torch.fx.symbolic_trace(copy.deepcopy(model).train(mode))
    traced.graph.lint()
    traced = pickle.loads(pickle.dumps(traced))
    for _ in range(2):
        x = torch.randn(4, 3)
        assert torch.equal(traced(x), model.train(mode)(x))
    assert_same_state(traced.state_dict(), model.state_dict())


def test_a_trace_of_a_layer_with_another_forward_assigned_runs_it_once():
    model, x = nn.Sequential(bn.BatchNorm1d(3)), torch.randn(4, 3)
    ours = model[0].forward
    model[0].forward = lambda x: ours(x) * 2
    assert torch.equal(torch.fx.symbolic_trace(model)(x), model(x))


def test_a_trace_warns_of_hooks_that_it_would_run_twice():
    model = nn.Sequential(bn.BatchNorm1d(3))
    model[0].register_forward_hook(lambda module, inputs, y: y * 2)
    with pytest.warns(UserWarning, match=r"hooks of 0 return, and the graph calls them once more"):
        torch.fx.symbolic_trace(model)


def test_a_trace_of_a_pruned_layer_prunes_at_each_call():
    model, x = nn.Sequential(pruned(bn.BatchNorm1d(3))), torch.randn(4, 3)
    traced = torch.fx.symbolic_trace(model)
    with torch.no_grad():
        model[0].weight_orig *= 3
    assert torch.equal(traced(x), model(x))


def test_neither_a_tensor_nor_a_proxy_is_an_input_type_error():
    with pytest.raises(bn.InputTypeError, match="input must be a tensor; got list"):
        bn.BatchNorm1d(2)([[1.0, 2.0], [3.0, 4.0]])


# Averages of models.


def averaged(of):
    """Return a small network trained for 5 steps, and the average of its states after each step."""
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(4, 3), of.BatchNorm1d(3), nn.ReLU(), nn.Linear(3, 1))
    average = AveragedModel(model, use_buffers=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(5):
        optimizer.zero_grad()
        model(torch.randn(16, 4)).square().mean().backward()
        optimizer.step()
        average.update_parameters(model)
    return average


# float32 over 5 steps, values of order 1: some 10 roundings of 6e-8 a step.
CLOSE = {"rtol": 3e-6, "atol": 3e-6}


def test_an_averaged_model_averages_as_with_torchs_layers():
    torch.testing.assert_close(averaged(bn).state_dict(), averaged(nn).state_dict(), **CLOSE)


def test_update_bn_finds_the_statistics_that_torchs_layers_would_have():
    ours, theirs = averaged(bn), averaged(nn)
    batches = [torch.randn(16, 4) for _ in range(4)]
    update_bn(batches, ours)
    update_bn(batches, theirs)
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict(), **CLOSE)
    assert ours.module[1].momentum == 0.1


# Tools that replace gamma.


class Exponential(nn.Module):
    def forward(self, weight):
        return weight.exp()


def assigned(layer):
    values = torch.arange(3.0)
    del layer.weight
    layer.weight = values
    return layer


def replica(layer):
    copy = layer._replicate_for_data_parallel()
    copy.weight, copy.bias = torch.arange(3.0), layer.bias
    return copy


def pruned(layer):
    prune.l1_unstructured(layer, "weight", 0.5)
    return layer


def parametrized(layer):
    parametrize.register_parametrization(layer, "weight", Exponential())
    return layer


TAKEN = [assigned, replica, pruned, parametrized]


@pytest.mark.parametrize("mode", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("tool", TAKEN)
def test_a_gamma_that_a_tool_has_put_elsewhere_is_used_as_by_torchs_layer(tool, mode):
    x = torch.randn(6, 3, 4)
    found = []
    for kind in (bn.BatchNorm1d, nn.BatchNorm1d):
        layer = kind(3)
        with torch.no_grad():
            layer.weight.copy_(torch.tensor([0.1, 2.0, 3.0]))
        changed = tool(layer).train(mode)
        y = changed(x)
        y.square().sum().backward()
        found.append([y, *(parameter.grad for parameter in layer.parameters())])
    # gamma is up to exp(3) = 20: float32 gradients of 24 values of order 40, some 10 roundings of 24 * 40 * 6e-8 each
    torch.testing.assert_close(*found, rtol=1e-5, atol=6e-4)
