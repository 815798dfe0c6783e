"""Models of ours that accelerate builds without memory, loads, offloads and dispatches."""

import pytest
import torch
from torch import nn

import batchnorm as bn
from support import assert_same_state, peer


def network():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), bn.BatchNorm1d(3, activation="relu"), bn.BatchNorm1d(3))
    return bn.add_domains(model, ["real"])


@pytest.fixture
def accelerate():
    return peer("accelerate")


@pytest.fixture
def saved(tmp_path):
    """Return a trained model and a file with its state dict."""
    source = network()
    for _ in range(3):
        source(2 * torch.randn(16, 4) + 1)
    torch.save(source.state_dict(), tmp_path / "model.bin")
    return source, str(tmp_path / "model.bin")


def trains_as(source, model):
    """Compare outputs in eval, then train both on a batch and on one with an infinity, and compare the states."""
    x, poisoned = torch.randn(8, 4), torch.full((8, 4), torch.inf)
    assert torch.equal(source.eval()(x), model.eval()(x))
    for one in (source, model):
        one.train()
        one(poisoned)
    assert torch.equal(source(x), model(x))
    assert_same_state(dict(model.state_dict()), dict(source.state_dict()))
    assert int(model[1].skipped_batches) == int(source[1].skipped_batches) == 1


@pytest.mark.parametrize("include_buffers", [False, True])
def test_a_model_of_init_empty_weights_runs_once_its_checkpoint_is_loaded(accelerate, saved, include_buffers):
    source, file = saved
    with accelerate.init_empty_weights(include_buffers=include_buffers):
        model = network()
    accelerate.load_checkpoint_in_model(model, file, device_map={"": "cpu"})
    trains_as(source, model)


@pytest.mark.parametrize("frozen", [False, True])
def test_a_model_that_is_loaded_and_dispatched_runs(accelerate, saved, frozen):
    source, file = saved
    with accelerate.init_empty_weights(include_buffers=True):
        model = network()
    for one in (source, model) if frozen else ():
        bn.freeze(one)
    model = accelerate.load_checkpoint_and_dispatch(model, file, device_map={"": "cpu"})
    if frozen:
        before = {name: values.clone() for name, values in source.state_dict().items()}
        model.train()(torch.randn(8, 4))
        assert_same_state(dict(model.state_dict()), before)
    else:
        trains_as(source, model)


def test_statistics_loaded_in_half_precision_are_float32_once_the_model_runs(accelerate, saved):
    _, file = saved
    with accelerate.init_empty_weights(include_buffers=True):
        model = network()
    accelerate.load_checkpoint_in_model(model, file, device_map={"": "cpu"}, dtype=torch.bfloat16)
    model(torch.randn(8, 4, dtype=torch.bfloat16))
    assert model[1].weight.dtype == torch.bfloat16
    assert model[1].running_mean.dtype == model[1].running_var.dtype == torch.float32


def test_a_model_offloaded_to_disk_is_run_recalibrated_and_adapted(accelerate, saved, tmp_path):
    source, _ = saved
    model = accelerate.disk_offload(network(), str(tmp_path / "offload"), execution_device="cpu")
    assert model[0].weight.is_meta
    rows = torch.randn(32, 4)
    bn.recalibrate(model, rows.split(8))
    with bn.adapt(model, rows.split(8)):
        model.eval()(rows)
    source.load_state_dict(network().state_dict())
    bn.recalibrate(source, rows.split(8))
    for name in ("running_mean", "running_var"):
        torch.testing.assert_close(getattr(model[1], name), getattr(source[1], name))


def test_a_model_without_its_checkpoint_is_refused_by_name(accelerate):
    with accelerate.init_empty_weights():
        model = network()
    with pytest.raises(bn.InputError, match=r"must be loaded; got 0\.weight on the meta device"):
        bn.recalibrate(model, torch.randn(16, 4).split(8))
