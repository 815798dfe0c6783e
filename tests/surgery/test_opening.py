"""The door of every operation: which models it lets in, and the words for those that it does not."""

import copy
import re
import threading

import pytest
import torch
import torch.distributed as dist
from torch import nn

import batchnorm as bn
from batchnorm.surgery.opening import batch_norms, opened
from support import compiles, copied_state


def network():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())


def scripted():
    return torch.jit.script(network())


def quantized():
    return nn.Sequential(network(), torch.ao.nn.quantized.Quantize(0.1, 0, torch.quint8))


def dynamically_quantized():
    return nn.Sequential(torch.ao.nn.quantized.dynamic.Linear(3, 4), nn.BatchNorm1d(4))


@pytest.fixture
def process_group(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


# Copies.


def test_a_copy_is_opened_or_in_place_the_model_itself():
    model = network()
    assert opened(model, "convert", inplace=True) is model
    made = opened(model, "convert", inplace=False)
    assert made is not model
    assert made[1].weight is not model[1].weight
    assert torch.equal(made[1].weight, model[1].weight)


def test_a_copy_shares_the_process_groups(process_group):
    model = nn.Sequential(nn.SyncBatchNorm(3, process_group=dist.group.WORLD))
    made = opened(model, "convert", inplace=False)
    assert made[0].process_group is dist.group.WORLD
    assert made[0].weight is not model[0].weight


def test_a_copy_is_made_of_lazy_layers_and_of_attributes_with_a_graph():
    model = nn.Sequential(nn.LazyBatchNorm2d(), nn.Conv2d(3, 4, 3))
    model.cache = {"last": [model[1](torch.randn(2, 3, 5, 5))]}
    made = opened(model, "convert", inplace=False)
    assert made[0].running_mean is not model[0].running_mean
    assert torch.equal(made.cache["last"][0], model.cache["last"][0])
    assert not made.cache["last"][0].requires_grad


def test_a_model_that_cannot_be_copied_names_the_way_out():
    model = network()
    model.lock = threading.Lock()
    with pytest.raises(bn.UnsupportedError, match=r"cannot be made: TypeError: .*convert\(model, inplace=True\)"):
        opened(model, "convert", inplace=False)
    assert opened(model, "convert", inplace=True) is model


# Refusals.


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (None, "got NoneType"),
        (network, "got function"),
        (nn.Linear, "got the class Linear, of which you may pass an instance"),
        (network().state_dict(), "which may be a state dict: load it into a model"),
    ],
)
def test_what_is_no_module_is_a_type_error(given, words):
    with pytest.raises(bn.InputTypeError, match=re.escape(words)):
        opened(given, "fold", inplace=False)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (quantized, "before quantization; got quantized Quantize at 1"),
        (dynamically_quantized, "before quantization; got quantized Linear at 0"),
        (scripted, "TorchScript has compiled (the model)"),
        (lambda: nn.Sequential(nn.ReLU(), scripted()), "TorchScript has compiled 1"),
    ],
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_quantized_and_scripted_modules_are_refused(make, words):
    with pytest.raises(bn.UnsupportedError, match=re.escape(words)):
        opened(make(), "fold", inplace=False)


@compiles
def test_a_compiled_model_names_the_model_to_pass():
    model = network()
    before = copied_state(model)
    with pytest.raises(bn.UnsupportedError, match=r"at \(the model\)\. Pass model\._orig_mod, and compile"):
        opened(torch.compile(model), "fold", inplace=True)
    with pytest.raises(bn.UnsupportedError, match=r"at 1\. Pass model\.1\._orig_mod, and compile"):
        opened(nn.Sequential(nn.ReLU(), torch.compile(model)), "fold", inplace=True)
    assert all(torch.equal(values, before[name]) for name, values in model.state_dict().items())


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
def test_a_model_in_distributed_data_parallel_names_the_model_to_pass(process_group):
    model = nn.parallel.DistributedDataParallel(network())
    with pytest.raises(bn.UnsupportedError, match=r"not be synchronized.*Pass model\.module, and wrap the result"):
        opened(model, "accelerate", inplace=False)
    assert opened(model.module, "accelerate", inplace=True) is model.module


def test_a_graph_module_is_let_in():
    traced = torch.fx.symbolic_trace(network())
    assert type(opened(traced, "fold", inplace=False)).__name__ == "GraphModule"


# The layers.


def test_layers_of_all_kinds_are_found_once_each():
    shared = nn.BatchNorm1d(3)
    kinds = [shared, bn.BatchNorm(3), nn.SyncBatchNorm(3), nn.LazyBatchNorm2d(), shared, nn.InstanceNorm2d(3)]
    kinds += [nn.InstanceNorm2d(3, track_running_stats=True), nn.GroupNorm(1, 3)]
    assert list(batch_norms(nn.Sequential(*kinds), "fold")) == ["0", "1", "2", "3"]


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (nn.Linear(2, 3), "Linear has no normalization layer"),
        (nn.Sequential(nn.LayerNorm(3), nn.LayerNorm(3), nn.GroupNorm(1, 3)), "has 2 LayerNorm and 1 GroupNorm"),
        (nn.TransformerEncoderLayer(4, 2), "TransformerEncoderLayer has 2 LayerNorm"),
    ],
)
def test_without_batch_norm_the_error_says_which_layers_there_are(model, words):
    with pytest.raises(bn.InputError, match=f"fold needs a model with batch normalization layers; .*{words}"):
        batch_norms(model, "fold")


def test_the_copy_of_a_model_keeps_its_hooks():
    model, seen = network(), []
    model[1].register_forward_hook(lambda *_: seen.append(1))
    opened(model, "fold", inplace=False)(torch.randn(2, 3, 5, 5))
    assert seen == [1]
    assert copy.deepcopy(model) is not model
