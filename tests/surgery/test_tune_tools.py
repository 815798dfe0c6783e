"""`tune` and what people do with models: copies, state dicts, compilers, contexts, and the end of tuning."""

import copy

import pytest
import torch
from torch import fx, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrizations, prune
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.utils.checkpoint import checkpoint

import batchnorm as bn
from batchnorm.surgery.tuning.tuned_pairs import is_tuned
from ranks import on_ranks, run_rank
from support import assert_same_state, compiles, copied_state, randn, saved_and_loaded

X = randn(4, 3, 6, 6, dtype=torch.float64)


def stock():
    """Return a float64 network with two batch norms of torch's, whose statistics are those of a few batches."""
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.ReLU()),
        *(nn.ConvTranspose2d(5, 4, 2, bias=False), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(100, 2)),
    ).double()
    with torch.no_grad():
        for seed in range(3):
            model(2 * randn(4, 3, 6, 6, seed=seed, dtype=torch.float64) + 1)
    return model.eval()


def tuned():
    """Return the network tuned, in training mode."""
    model, report = bn.tune(stock())
    assert len(report.layers) == 2
    return model.train()


def gradients(model, x=X):
    """Return the gradients of a loss, by name."""
    loss = model(x).square().sum()
    names = [name for name, _ in model.named_parameters()]
    return dict(zip(names, torch.autograd.grad(loss, list(model.parameters())), strict=True))


def assert_same_model(model, expected, x=X):
    """Compare the outputs and gradients of two models."""
    torch.testing.assert_close(model(x), expected(x), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradients(model, x), gradients(expected, x), rtol=1e-10, atol=1e-10)


def tuned_paths(model):
    return [path for path, module in model.named_modules() if is_tuned(module)]


PATHS = ["0", "1", "3", "4"]


# Names and state dicts.


def test_the_state_dict_keeps_names_and_values_and_loads_strictly_both_ways():
    model, other = tuned(), stock()
    assert_same_state(dict(model.state_dict()), dict(other.state_dict()))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    other.load_state_dict(model.state_dict(), strict=True)
    assert_same_model(model, other)
    model = tuned()
    model.load_state_dict(other.state_dict(), strict=True)
    assert_same_model(model, other)
    assert tuned_paths(model) == PATHS


def test_the_state_dict_of_a_tuned_model_freezes_one_of_our_layers():
    ours = nn.Sequential(nn.Linear(3, 3), bn.BatchNorm1d(3))
    ours.load_state_dict(bn.tune(ours)[0].state_dict())
    assert ours[1].frozen_statistics


def test_modules_keep_their_names_classes_and_parameters():
    model, other = tuned(), stock()
    assert [name for name, _ in model.named_modules()] == [name for name, _ in other.named_modules()]
    assert all(isinstance(module, type(its)) for module, its in zip(model.modules(), other.modules(), strict=True))
    assert [type(module).__name__ for module in model] == [type(module).__name__ for module in other]
    assert "tuned=True" in repr(model[0])
    assert "tuned=True" in repr(model[1])


# Copies.


def test_the_model_given_stays_as_it_is():
    model = stock()
    before, text = copied_state(model), repr(model)
    model_tuned, _ = bn.tune(model, X)
    gradients(model_tuned.train())
    assert_same_state(copied_state(model), before)
    assert repr(model) == text
    assert not model.training


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: saved_and_loaded(model, weights_only=False)])
def test_a_copy_is_tuned_and_independent(copied):
    model = tuned()
    twin = copied(model)
    assert_same_model(twin, model)
    assert tuned_paths(twin) == PATHS
    with torch.no_grad():
        twin[1].weight.mul_(2)
    expected = stock()
    expected[1].weight.data.mul_(2)
    assert_same_model(twin, expected)
    assert_same_model(model, stock())
    bn.unfreeze(twin)
    assert tuned_paths(model) == PATHS


def test_a_model_that_is_tuned_twice_is_tuned():
    model = tuned()
    again, report = bn.tune(model)
    assert len(report.layers) == 2
    assert_same_model(again, model)
    same, report = bn.tune(model, inplace=True)
    assert same is model
    assert len(report.layers) == 2
    assert_same_model(model, stock())


# The end.


def test_unfreeze_leaves_ordinary_layers_of_ours():
    model, (converted, _) = tuned(), bn.convert(stock())
    assert bn.unfreeze(model) is model
    assert tuned_paths(model) == []
    assert [type(module) for module in model] == [type(module) for module in converted]
    assert [vars(module).keys() for module in model] == [vars(module).keys() for module in converted]
    assert repr(model) == repr(converted)
    converted.train()
    assert_same_model(model, converted)
    assert_same_state(copied_state(model), copied_state(converted))
    assert model[1].num_batches_tracked == 5


def test_unfreeze_of_some_layers_ends_the_tuning_of_these():
    model = tuned()
    bn.unfreeze(model, layers="4")
    assert tuned_paths(model) == ["0", "1"]
    torch.testing.assert_close(model.eval()(X), stock()(X))


def test_unfreezing_gamma_and_beta_alone_goes_on_tuning():
    model = bn.freeze(tuned(), affine=True)
    assert not model[1].weight.requires_grad
    bn.unfreeze(model, statistics=False)
    assert model[1].weight.requires_grad
    assert_same_model(model, stock())
    assert tuned_paths(model) == PATHS


def test_loading_the_state_dict_of_a_layer_that_is_not_frozen_ends_the_tuning_too():
    model, (converted, _) = tuned(), bn.convert(stock())
    model.load_state_dict(converted.state_dict())
    assert tuned_paths(model) == []
    assert not model[1].frozen_statistics


def test_a_class_that_other_code_has_changed_stays_when_the_tuning_ends():
    model = tuned()
    parametrizations.weight_norm(model[0])
    assert_same_model(model, model)
    torch.testing.assert_close(model(X), stock()(X))
    bn.unfreeze(model)
    assert hasattr(model[0], "parametrizations")
    torch.testing.assert_close(model.eval()(X), stock()(X))


def test_a_pruned_weight_is_folded_as_it_is_now():
    model, other = tuned(), stock()
    for each in (model, other):
        prune.l1_unstructured(each[0], "weight", 20)
    torch.testing.assert_close(model(X), other(X))


def test_torchs_layers_come_back_from_a_tuned_model():
    model = tuned()
    result, _ = bn.to_torch(model)
    assert type(result[1]) is nn.BatchNorm2d
    assert_same_model(result, stock())
    assert tuned_paths(model) == PATHS


def test_a_tuned_model_is_folded_for_inference():
    model = tuned()
    folded, report = bn.fold(model.eval())
    assert len(report.layers) == 2
    torch.testing.assert_close(folded(X), stock()(X))
    assert tuned_paths(model) == PATHS


@pytest.mark.parametrize("function", [bn.fold, bn.to_torch], ids=lambda function: function.__name__)
def test_a_tuned_model_is_not_copied_without_the_statistics_in_force(function):
    model = tuned()
    bn.add_domains(model, ["night"])
    with bn.use_domain(model, "night"), pytest.raises(bn.UnsupportedError, match="outside of use_domain"):
        function(model)


def test_other_operations_ask_to_end_the_tuning_first():
    model = tuned()
    for inplace in (False, True):
        with pytest.raises(bn.UnsupportedError, match=r"convert takes a model that is not tuned; got the tuned Conv2d"):
            bn.convert(model, inplace=inplace)
    assert_same_model(model, stock())


# Compilers, tracers and transforms.


@compiles
def test_a_compiled_model_is_one_graph_with_the_same_gradients():
    model = tuned()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(X), model(X), rtol=1e-12, atol=1e-12)
    compiled(X).square().sum().backward()
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    torch.testing.assert_close(found, gradients(model), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_an_exported_model_computes_the_same(training, strict):
    model = tuned().train(training)
    exported = torch.export.export(model, (X,), strict=strict)
    torch.testing.assert_close(exported.module()(X), model(X))
    assert {*exported.state_dict} == {*model.state_dict()}


class Block(nn.Module):
    """A block that torch.fx traces into."""

    def __init__(self):
        super().__init__()
        self.layers = stock()

    def forward(self, x):
        return self.layers(x)


def test_a_model_that_torch_fx_traces_stays_tuned():
    model, _ = bn.tune(Block())
    traced = fx.symbolic_trace(model)
    assert_same_model(traced, model)
    assert tuned_paths(copy.deepcopy(traced)) == [f"layers.{path}" for path in PATHS]
    leaf = fx.GraphModule(model, fx.Tracer().trace(model))
    assert [node.target for node in leaf.graph.nodes if node.op == "call_module"][:2] == ["layers.0", "layers.1"]


class Everything(fx.Tracer):
    """A tracer without leaves."""

    def is_leaf_module(self, module, name):
        return False


def test_a_tracer_that_enters_all_modules_meets_the_pair_as_two_calls():
    model = tuned()[:2]
    graph = Everything().trace(model)
    assert [node.target for node in graph.nodes if node.op == "call_module"] == ["0", "1"]
    torch.testing.assert_close(fx.GraphModule(model, graph)(X), model(X))


@pytest.mark.filterwarnings("ignore:.*torch.jit.*deprecated")
def test_a_jit_trace_computes_the_same():
    model = tuned().eval()
    torch.testing.assert_close(torch.jit.trace(model, (X,))(X), model(X))


@pytest.mark.filterwarnings("ignore:.*torch.jit.*deprecated")
def test_torchscript_is_refused_in_plain_words():
    with pytest.raises(bn.UnsupportedError, match=r"TorchScript cannot copy a tuned layer; call batchnorm.unfreeze"):
        torch.jit.script(tuned())


def test_data_parallel_is_refused_in_plain_words():
    with pytest.raises(bn.UnsupportedError, match=r"DataParallel cannot copy a tuned layer; use .*Distributed"):
        tuned()[0]._replicate_for_data_parallel()


@pytest.mark.parametrize(
    "tool",
    [lambda model: fuse_conv_bn_eval(model[0], model[1]), nn.SyncBatchNorm.convert_sync_batchnorm],
    ids=["fuse_conv_bn_eval", "convert_sync_batchnorm"],
)
def test_tools_that_take_the_batch_norm_for_torchs_are_stopped(tool):
    with pytest.raises(bn.UnsupportedError, match=r"takes BatchNorm2d\(5\) for a layer that normalizes"):
        tool(tuned().eval())


def test_gradients_per_sample_are_right():
    model, state = tuned(), None
    state = dict(model.named_parameters())

    def loss(state, x):
        return torch.func.functional_call(model, state, x.unsqueeze(0)).square().sum()

    each = torch.func.vmap(torch.func.grad(loss), (None, 0))(state, X)
    expected = gradients(stock())
    torch.testing.assert_close({name: values.sum(0) for name, values in each.items()}, expected)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoints_give_the_same_gradients(reentrant):
    model = tuned()
    x = X.clone().requires_grad_()
    loss = checkpoint(model, x, use_reentrant=reentrant).square().sum()
    found = torch.autograd.grad(loss, list(model.parameters())) if not reentrant else None
    if reentrant:
        loss.backward()
        found = tuple(parameter.grad for parameter in model.parameters())
    torch.testing.assert_close(found, tuple(gradients(stock()).values()))


def averaged(rank):
    """Return the gradients of a tuned model in DistributedDataParallel on half of the batch."""
    model = DistributedDataParallel(tuned())
    model(X.chunk(2)[rank]).square().sum().backward()
    return {name: parameter.grad for name, parameter in model.module.named_parameters()}


@pytest.mark.distributed
def test_processes_average_the_gradients(tmp_path):
    expected = {name: values / 2 for name, values in gradients(stock()).items()}
    for found in on_ranks(averaged, 2, tmp_path):
        torch.testing.assert_close(found, expected)


# Contexts that give layers other statistics, or read their inputs.


def test_statistics_of_a_domain_are_folded():
    model, frozen = tuned(), bn.freeze(bn.convert(stock())[0])
    for each in (model, frozen):
        bn.add_domains(each, ["night"])
        with torch.no_grad():
            for layer in (each[1], each[4]):
                layer._buffers["running_mean_night"] += 1
                layer._buffers["running_var_night"] *= 2
    with bn.use_domain(model, "night"), bn.use_domain(frozen, "night"):
        assert_same_model(model, frozen)
        assert (model(X) - stock()(X)).abs().max() > 0.01
    assert_same_model(model, stock())


def test_a_shift_is_detected_as_with_frozen_layers():
    model, frozen = tuned().eval(), bn.freeze(bn.convert(stock())[0])
    loader = [X + 3, X + 4]
    assert bn.detect_shift(model, loader).to_dict() == bn.detect_shift(frozen, loader).to_dict()


@pytest.mark.parametrize("function", [bn.recalibrate, bn.adapt], ids=lambda function: function.__name__)
def test_new_statistics_need_unfreeze_and_are_right_after_it(function):
    model, (converted, _) = tuned().eval(), bn.convert(stock())
    with pytest.raises(bn.InputError, match=r"frozen; call batchnorm.unfreeze first"):
        function(model, [X])
    for each in (bn.unfreeze(model), converted):
        function(each, [X + 1])
    assert_same_model(model, converted)


if __name__ == "rank":
    run_rank(globals())
