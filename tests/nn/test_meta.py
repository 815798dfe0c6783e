"""Layers built on the meta device: whoever loads them, counts that no checkpoint fills begin at 0."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode

import batchnorm as bn
from batchnorm.nn.buffers import COUNTS
from support import PassThroughMode, assert_same_state, compiles

NAMES = ["real"]
GARBAGE = 94660979595648


def network():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), bn.BatchNorm1d(3, activation="relu"), bn.BatchNorm1d(3, momentum=None))
    return bn.add_domains(model, NAMES)


def on_meta(build=network):
    with torch.device("meta"):
        return build()


def trained():
    model = network()
    model(2 * torch.randn(16, 4) + 1)
    return model


def set_one_by_one(model, state):
    """Set each tensor of a state dict as accelerate's ``set_module_tensor_to_device`` does."""
    for key, values in state.items():
        path, _, name = key.rpartition(".")
        module = model.get_submodule(path)
        if name in module._buffers:
            module._buffers[name] = values.clone()
        else:
            module._parameters[name] = nn.Parameter(
                values.clone(), requires_grad=module._parameters[name].requires_grad
            )


def from_pretrained(model, state):
    """Load a state dict as ``PreTrainedModel.from_pretrained`` of transformers 5 does.

    transformers is not among the libraries of these tests. The two steps are those of its ``set_param_for_module`` and
    ``_move_missing_keys_from_meta_to_device``: each tensor of the checkpoint is set by ``setattr`` on its module, then
    each buffer that ``_non_persistent_buffers_set`` of its module names is set to ``torch.empty_like``. Here such new
    memory holds garbage for certain.
    """
    for key, values in state.items():
        path, _, name = key.rpartition(".")
        module = model.get_submodule(path)
        setattr(module, name, nn.Parameter(values.clone()) if name in module._parameters else values.clone())
    for key, buffer in list(model.named_buffers()):
        path, _, name = key.rpartition(".")
        if name in model.get_submodule(path)._non_persistent_buffers_set:
            setattr(model.get_submodule(path), name, torch.empty_like(buffer, device="cpu").fill_(GARBAGE))
    model.eval()


def assign(model, state):
    model.load_state_dict(copy.deepcopy(state), assign=True)


def assign_a_plain_dict(model, state):
    model.load_state_dict({name: values.clone() for name, values in state.items()}, assign=True)


def empty_and_load(model, state):
    model.to_empty(device="cpu").load_state_dict(state)


LOADERS = {
    loader.__name__: loader for loader in (set_one_by_one, from_pretrained, assign, assign_a_plain_dict, empty_and_load)
}


@pytest.fixture(params=LOADERS.values(), ids=LOADERS)
def pair(request):
    """Return a trained model, and one that was built on the meta device and has loaded its state."""
    source, model = trained(), on_meta()
    request.param(model, source.state_dict())
    return source, model


@pytest.fixture
def pair_without_counts():
    """Return a trained model, and one that was built on the meta device and whose layers do not know of its loading."""
    source, model = trained(), on_meta()
    set_one_by_one(model, source.state_dict())
    assert counts(model) == {}
    return source, model


def counts(model):
    return {name: values for name, values in model.named_buffers() if name.rpartition(".")[2].startswith(COUNTS)}


def same_training(source, model):
    """Train both on a batch, one with an infinity, and one in a domain, and compare outputs and all buffers."""
    x = torch.randn(8, 4, generator=torch.Generator().manual_seed(1))
    poisoned = x.clone()
    poisoned[2, 1] = torch.inf
    for one in (source, model):
        one.train()
        one(poisoned)
        with bn.use_domain(one, "real"):
            one(x + 2)
    assert torch.equal(source(x), model(x))
    assert_same_state(model.state_dict(), source.state_dict())
    assert int(source[1].skipped_batches) == int(model[1].skipped_batches) == 1


# On the meta device.


def test_no_count_is_on_the_meta_device():
    model = on_meta()
    assert counts(model) == {}
    assert model[1].skipped_batches is None
    assert all(values.is_meta for values in (*model.parameters(), *model.buffers()))
    assert model[1]._non_persistent_buffers_set == {"skipped_batches", "samples_seen", "samples_seen_real"}


def test_a_meta_layer_runs_in_training_and_eval_and_keeps_no_count():
    model, x = on_meta(), torch.randn(8, 4, device="meta")
    assert model(x).is_meta
    assert model.eval()(x).is_meta
    assert counts(model) == {}


def test_options_set_on_meta_begin_no_count_there_but_where_the_layer_is_loaded():
    layer = bn.BatchNorm1d(3, nonfinite="propagate", device="meta")
    layer.nonfinite = "skip"
    assert counts(layer) == {}
    set_one_by_one(layer, bn.BatchNorm1d(3).state_dict())
    layer(torch.full((4, 3), torch.nan))
    assert (int(layer.skipped_batches), int(layer.num_batches_tracked)) == (1, 0)


def test_a_layer_that_propagates_begins_no_count_of_skipped_batches():
    layer = bn.BatchNorm1d(3, nonfinite="propagate", device="meta")
    set_one_by_one(layer, bn.BatchNorm1d(3).state_dict())
    layer(torch.randn(4, 3))
    assert layer.skipped_batches is None
    assert int(layer.samples_seen) == 0


# Wherever it first runs.


def test_a_loaded_model_gives_the_outputs_of_its_source_in_eval(pair):
    source, model = pair
    x = torch.randn(8, 4)
    assert torch.equal(source.eval()(x), model.eval()(x))
    with bn.use_domain(source, "real"), bn.use_domain(model, "real"):
        assert torch.equal(source(x), model(x))


def test_a_loaded_model_trains_as_its_source(pair):
    same_training(*pair)


def test_counts_of_a_loaded_model_read_as_0_before_it_has_run(pair):
    layer = pair[1][1]
    assert [int(layer.skipped_batches), int(layer.samples_seen), int(layer.samples_seen_real)] == [0, 0, 0]


def test_a_model_that_ran_first_in_inference_mode_trains_on(pair_without_counts):
    source, model = pair_without_counts
    with torch.inference_mode():
        model(torch.randn(8, 4))
        assert int(model[1].skipped_batches) == 0
    set_one_by_one(model, source.state_dict())  # as before the batch
    same_training(source, model)


def test_a_model_that_ran_first_under_a_dispatch_mode_skips_there_and_trains_on(pair_without_counts):
    source, model = pair_without_counts
    with PassThroughMode():
        model(torch.full((8, 4), torch.nan))
    same_training(source, model)


def test_a_model_that_ran_first_under_fake_tensors_keeps_none_of_them(pair_without_counts):
    source, model = pair_without_counts
    with FakeTensorMode(allow_non_fake_inputs=True):
        model(torch.randn(8, 4))
    assert all(type(values) is torch.Tensor for values in model.buffers())
    same_training(source, model)


def test_a_model_that_ran_first_under_a_transform_keeps_none_of_its_tensors(pair_without_counts):
    source, model = pair_without_counts
    parameters = {name: values.detach().clone() for name, values in model.named_parameters()}
    buffers = {name: values.clone() for name, values in model.named_buffers()}

    def loss(parameters, buffers):
        return torch.func.functional_call(model, (parameters, buffers), torch.randn(8, 4)).sum()

    torch.func.grad(loss)(parameters, buffers)
    same_training(source, model)


def test_accumulated_micro_batches_of_a_loaded_model_are_skipped_and_counted(pair_without_counts):
    model = pair_without_counts[1].train()
    with bn.accumulate(model):
        for fill in (torch.nan, 1.0, 2.0):
            model(torch.full((8, 4), fill) + torch.randn(8, 4))
    assert int(model[1].skipped_batches) == 1
    assert all(values.isfinite().all() for values in model.buffers())


@compiles
def test_a_loaded_model_trains_compiled_as_one_graph(pair_without_counts):
    source, model = pair_without_counts
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for fill in (0.0, torch.inf, 0.0):
        x = torch.randn(8, 4)
        x[3] += fill
        compiled(x)
        source(x)
    assert int(model[1].skipped_batches) == 1
    for name, values in source.state_dict().items():
        # Sums of 8 float32 values below 8: a few roundings of 6e-8 times 8.
        torch.testing.assert_close(model.state_dict()[name], values, rtol=1e-6, atol=2e-6)


@compiles
def test_a_loaded_model_is_exported_and_keeps_no_tensor_of_the_export(pair_without_counts):
    source, model = pair_without_counts
    x = torch.randn(8, 4)
    for strict in (True, False):
        program = torch.export.export(model.train(), (x,), strict=strict)
        assert program.module() is not None
    torch.testing.assert_close(torch.export.export(model.eval(), (x,)).module()(x), source.eval()(x))
    assert all(type(values) is torch.Tensor for values in model.buffers())
    same_training(source, model)


# Copies, pickles, and moving.


def test_copies_of_a_loaded_model_have_as_many_buffers_as_it_will_have(pair):
    model = pair[1]
    averaged = torch.optim.swa_utils.AveragedModel(model)
    model.train()(torch.randn(8, 4))
    averaged.update_parameters(model)
    assert [name for name, _ in averaged.module.named_buffers()] == [name for name, _ in model.named_buffers()]


def test_a_copy_or_pickle_on_meta_is_on_meta_and_can_be_loaded():
    source = trained()
    for model in (copy.deepcopy(on_meta()), pickle.loads(pickle.dumps(on_meta()))):
        assert counts(model) == {}
        set_one_by_one(model, source.state_dict())
        same_training(copy.deepcopy(source), model)


def test_a_model_pickled_with_counts_on_meta_runs_once_it_is_loaded():
    model = on_meta()
    for layer in model[1:]:  # as models were before
        layer._buffers.update(dict.fromkeys(COUNTS, torch.zeros((), dtype=torch.int64, device="meta")))
    model = pickle.loads(pickle.dumps(model))
    assert counts(model) == {}
    source = trained()
    set_one_by_one(model, source.state_dict())
    same_training(source, model)


def test_to_meta_and_back_begins_the_layer_anew():
    model = trained()
    model.to("meta")
    assert counts(model) == {}
    model.to_empty(device="cpu")
    fresh = network()
    assert_same_state(dict(model[1].named_buffers()), dict(fresh[1].named_buffers()))
    assert_same_state(dict(model[1].named_parameters()), dict(fresh[1].named_parameters()))


@pytest.mark.usefixtures("filled_empties")
def test_a_frozen_layer_that_comes_from_meta_begins_with_the_values_of_a_new_one():
    layer = bn.freeze(bn.BatchNorm1d(3, device="meta"), affine=True).to_empty(device="cpu")
    with pytest.warns(UserWarning, match="leaves frozen"):
        layer.reset_parameters()
    assert_same_state(layer.state_dict(), bn.BatchNorm1d(3).state_dict())


@pytest.mark.parametrize("loader", LOADERS.values(), ids=LOADERS)
def test_a_layer_frozen_on_meta_is_filled(loader):
    source, model = trained(), bn.freeze(on_meta(), affine=True)
    loader(model, dict(source.state_dict()) if loader is not assign else bn.freeze(source, affine=True).state_dict())
    assert_same_state(dict(model.state_dict()), dict(source.state_dict()))
    assert torch.equal(model.train()(torch.ones(8, 4)), source.eval()(torch.ones(8, 4)))
    assert model[1].frozen_statistics


def test_a_lazy_model_on_meta_is_loaded_after_its_first_batch():
    model = on_meta(lambda: nn.Sequential(nn.Linear(4, 3), bn.LazyBatchNorm1d(), bn.LazyBatchNorm1d()))
    model(torch.randn(8, 4, device="meta"))
    source = nn.Sequential(nn.Linear(4, 3), bn.BatchNorm1d(3), bn.BatchNorm1d(3))
    set_one_by_one(model, source.state_dict())
    model(torch.full((8, 4), torch.nan))
    assert int(model[1].skipped_batches) == 1


def test_a_domain_added_to_a_loaded_model_counts_samples_of_its_own():
    model = on_meta(lambda: nn.Sequential(bn.BatchNorm1d(3)))
    set_one_by_one(model, nn.Sequential(bn.BatchNorm1d(3)).state_dict())
    bn.add_domains(model, ["drawn"])
    assert [int(model[0].samples_seen), int(model[0].samples_seen_drawn)] == [0, 0]


@pytest.mark.parametrize("action", [bn.recalibrate, bn.adapt, bn.detect_shift], ids=lambda action: action.__name__)
@pytest.mark.parametrize("place", ["statistics", "parameters"])
def test_statistics_of_a_model_on_meta_are_refused_by_name(action, place):
    model = on_meta()
    if place == "parameters":
        for layer in model[1:]:
            layer._buffers.update(dict(network()[1].named_buffers()))
    with pytest.raises(bn.InputError, match=r"must be loaded.* meta device"):
        action(model, torch.randn(16, 4).split(8))


def test_layers_of_a_file_that_is_loaded_twice_are_in_contexts_of_their_own():
    data = pickle.dumps(bn.add_domains(bn.BatchNorm1d(3), NAMES))
    one, other = pickle.loads(data), pickle.loads(data)
    with bn.use_domain(one, "real"):
        assert (one.active_domain, other.active_domain) == ("real", None)


def test_counts_follow_a_model_whose_other_tensors_were_set_elsewhere():
    """A loader that sets the tensors of a checkpoint on another device knows of no others; here that device is meta."""
    source = trained()
    source[1](torch.full((4, 3), torch.nan))
    model = copy.deepcopy(source)
    set_one_by_one(model, {name: values.to("meta") for name, values in model.state_dict().items()})
    assert model(torch.randn(8, 4, device="meta")).is_meta
    assert counts(model) == {}
    set_one_by_one(model, source.state_dict())
    assert torch.equal(source.eval()(torch.ones(8, 4)), model.eval()(torch.ones(8, 4)))


def test_a_model_built_of_fake_tensors_counts_once_its_state_is_assigned():
    with FakeTensorMode():
        layer = bn.BatchNorm1d(3)
    layer.load_state_dict(bn.BatchNorm1d(3).state_dict(), assign=True)
    layer(torch.full((4, 3), torch.nan))
    assert int(layer.skipped_batches) == 1


def test_parameters_may_be_empty_but_for_forward_and_backward():
    """DeepSpeed's ZeRO-3 sets ``parameter.data`` in such hooks, and gathers again before the backward."""
    source, model = trained(), trained()
    whole = {parameter: parameter.data.clone() for parameter in model.parameters()}

    def gather(module, *_):
        for parameter in module.parameters():
            parameter.data = whole[parameter]

    def release(module, *_):
        for parameter in module.parameters():
            parameter.data = torch.empty(0)

    for module in model:
        module.register_forward_pre_hook(gather)
        module.register_forward_hook(release)
    release(model)
    for _ in range(3):
        x = torch.randn(8, 4)
        losses = [one(x).square().sum() for one in (source, model)]
        gather(model)
        for loss in losses:
            loss.backward()
        release(model)
    for mine, theirs in zip(model.parameters(), source.parameters(), strict=True):
        assert torch.equal(mine.grad, theirs.grad)
