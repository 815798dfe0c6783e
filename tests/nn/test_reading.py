"""Functions that take a layer of ours for torch's, because they read its attributes."""

import copy
import inspect
import re

import pytest
import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

import batchnorm as bn
from support import compiles, randn

CLOSE = {"rtol": 1e-5, "atol": 1e-5}  # sums of 27 products of values near 3: some 30 roundings of 6e-8 each, times 3
AT_INFERENCE = [{"activation": "relu"}, {"activation": "sigmoid"}, {"channel_dim": -1}]
IN_TRAINING = {
    "virtual_batch_size=4": lambda: bn.BatchNorm2d(4, virtual_batch_size=4),
    "renorm=Renorm(r_max=2.0, d_max=1.0)": lambda: bn.BatchNorm2d(4, renorm=bn.Renorm(2.0, 1.0)),
    "sync=True": lambda: bn.BatchNorm2d(4, sync=True),
    "small_batch='running'": lambda: bn.BatchNorm2d(4, small_batch="running"),
    "unbiased=False": lambda: bn.BatchNorm2d(4, unbiased=False),
    "frozen_statistics=True": lambda: bn.freeze(bn.BatchNorm2d(4)),
    "domains=['drawn']": lambda: bn.add_domains(bn.BatchNorm2d(4), ["drawn"]),
}


def fuse_by_hand(conv, norm):
    """Fuse as the libraries of detectors do: each has a copy of this function."""
    fused = copy.deepcopy(conv)
    scale = norm.weight / torch.sqrt(norm.eps + norm.running_var)
    fused.weight = nn.Parameter(fused.weight * scale.reshape(-1, 1, 1, 1))
    fused.bias = nn.Parameter((fused.bias - norm.running_mean) * scale + norm.bias)
    return fused


def freeze_by_hand(norm):
    """Return weight and bias of a frozen layer, as libraries of detectors do."""
    scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
    return scale, norm.bias - norm.running_mean * scale


def to_torchs_layer(norm):
    return nn.BatchNorm2d(norm.num_features, norm.eps, norm.momentum)


READERS = {
    "fuse_conv_bn_eval": lambda norm: fuse_conv_bn_eval(nn.Conv2d(3, 4, 3).eval(), norm.eval()),
    "fuse_linear_bn_eval": lambda norm: fuse_linear_bn_eval(nn.Linear(3, 4).eval(), norm.eval()),
    "convert_sync_batchnorm": nn.SyncBatchNorm.convert_sync_batchnorm,
    "fuse_by_hand": lambda norm: fuse_by_hand(nn.Conv2d(3, 4, 3), norm),
    "freeze_by_hand": freeze_by_hand,
    "to_torchs_layer": to_torchs_layer,
}


@pytest.mark.parametrize("options", AT_INFERENCE, ids=str)
@pytest.mark.parametrize("name", READERS)
def test_a_tool_is_stopped_where_an_option_makes_torchs_formula_wrong(name, options):
    option = "=".join(f"{name}={value!r}" for name, value in options.items())
    with pytest.raises(
        bn.UnsupportedError, match=rf"^{name} takes BatchNorm2d\(4\).*got {re.escape(option)}\..*to_torch"
    ):
        READERS[name](bn.BatchNorm2d(4, **options))


@pytest.mark.parametrize("fuse", [fuse_conv_bn_eval, fuse_by_hand])
@pytest.mark.parametrize("make", [lambda: bn.BatchNorm2d(4), *IN_TRAINING.values()], ids=["plain", *IN_TRAINING])
def test_fusing_at_inference_needs_nothing_of_the_options_of_training(make, fuse):
    conv, norm, x = nn.Conv2d(3, 4, 3), make(), randn(2, 3, 7, 7)
    with torch.no_grad():
        norm.running_mean.add_(randn(4))
        norm.running_var.mul_(3)
    model = nn.Sequential(conv, norm).eval()
    torch.testing.assert_close(fuse(conv, norm)(x), model(x), **CLOSE)


def test_fusing_in_a_domain_takes_its_statistics():
    conv, norm, x = nn.Conv2d(3, 4, 3), bn.add_domains(bn.BatchNorm2d(4), ["drawn"]), randn(2, 3, 7, 7)
    with bn.use_domain(norm, "drawn"):
        norm(randn(8, 4, 3, 3) * 3 + 5)
        model = nn.Sequential(conv, norm).eval()
        torch.testing.assert_close(fuse_conv_bn_eval(conv, norm)(x), model(x), **CLOSE)


@pytest.mark.parametrize("mode", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("lost", IN_TRAINING)
def test_a_tool_that_builds_another_layer_is_told_what_is_lost_in_training(lost, mode):
    layer = IN_TRAINING[lost]().train(mode)
    with pytest.warns(UserWarning, match=rf"^convert_sync_batchnorm copies .* lacks {re.escape(lost)} and"):
        nn.SyncBatchNorm.convert_sync_batchnorm(layer)


def fuse_with_activation(norm):
    scale = norm.weight / (norm.running_var + norm.eps).sqrt()
    return scale, norm.bias - norm.running_mean * scale, norm.activation


def test_a_function_that_reads_the_option_too_knows_of_it():
    scale, _, activation = fuse_with_activation(bn.BatchNorm2d(4, activation="relu"))
    assert activation == "relu"
    torch.testing.assert_close(scale, torch.full((4,), (1 + 1e-5) ** -0.5))
    with pytest.raises(bn.UnsupportedError, match=r"got channel_dim=-1\."):
        fuse_with_activation(bn.BatchNorm2d(4, activation="relu", channel_dim=-1))


def oracle(norm, x):
    y = torch.nn.functional.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=norm.eps)
    return torch.relu(y)


def made_and_read():
    norm = bn.BatchNorm2d(4, activation="silu", channel_dim=-1)
    return norm.num_features, norm.eps


def test_a_function_that_names_the_activation_knows_of_it():
    x = randn(2, 4, 3, 3)
    torch.testing.assert_close(
        oracle(bn.BatchNorm2d(4, activation="relu").eval(), x), torch.relu(x / (1 + 1e-5) ** 0.5)
    )
    with pytest.raises(bn.UnsupportedError, match=r"got activation='silu'\."):
        oracle(bn.BatchNorm2d(4, activation="silu").eval(), x)
    assert made_and_read() == (4, 1e-5)


def frozen_without_eps(norm):
    """Return the output of a frozen layer as transformers' detectors compute it, with an eps of their own."""
    width = norm.num_features
    mean, var, weight, bias = norm.running_mean, norm.running_var, norm.weight, norm.bias
    scale = (weight * (var + 1e-5).rsqrt()).reshape(1, width, 1, 1)
    return lambda x: x * scale + (bias - mean * scale.flatten()).reshape(1, width, 1, 1)


def test_a_tool_that_reads_no_eps_drops_the_activation_and_takes_to_torchs_model():
    norm, x = bn.BatchNorm2d(4, activation="relu"), randn(2, 4, 3, 3)
    norm(randn(8, 4, 3, 3) * 3 + 5)
    expected = norm.eval()(x)
    assert (frozen_without_eps(norm)(x) - expected).abs().max() > 0.5
    converted, _ = bn.to_torch(norm)
    torch.testing.assert_close(converted[1](frozen_without_eps(converted[0])(x)), expected, **CLOSE)


def test_a_plain_layer_converts_silently():
    layer = bn.BatchNorm2d(4)
    assert type(nn.SyncBatchNorm.convert_sync_batchnorm(layer)) is nn.SyncBatchNorm


def test_eps_is_readable_and_can_be_set_where_nothing_else_is_read():
    layer = bn.BatchNorm2d(4, eps=0.1, activation="relu")
    assert layer.eps == 0.1
    layer.eps = 0.2
    assert layer.eps == vars(layer)["eps"] == 0.2
    assert "eps=0.2" in repr(layer)
    assert dict(inspect.getmembers(layer))["eps"] == 0.2
    assert copy.deepcopy(layer).eps == 0.2


def test_a_new_eps_is_used_by_the_next_forward():
    layer, x = bn.BatchNorm1d(3, activation="relu").eval(), torch.ones(2, 3)
    for eps in (0.0625, 3.0):
        layer.eps = eps
        torch.testing.assert_close(layer(x), x / (1 + eps) ** 0.5)


def standardized(layer, x):
    return (x - layer.running_mean) / (layer.running_var + layer.eps).sqrt()


@compiles
def test_a_compiled_function_gets_the_number():
    layer, x = bn.BatchNorm1d(3, activation="relu").eval(), randn(4, 3)
    compiled = torch.compile(standardized, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(layer, x).relu(), layer(x))
    scaled = torch.compile(lambda x: x * layer.eps, backend="eager", fullgraph=True)
    torch.testing.assert_close(scaled(x), x * 1e-5)


class Stretched(bn.BatchNorm1d):
    def forward(self, x):
        return super().forward(x) * (1 + self.eps)


@compiles
def test_a_compiled_subclass_may_use_eps_beside_the_forward_of_its_base():
    layer, x = Stretched(3, activation="relu", eps=0.5).eval(), randn(4, 3)
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), (x / 1.5**0.5).relu() * 1.5)


def logged(layer):
    return {"eps": layer.eps, "num_features": layer.num_features}


def to_group_norm(norm):
    return nn.GroupNorm(2, norm.num_features, norm.eps)


def test_a_function_that_logs_settings_or_builds_another_kind_of_layer_gets_them():
    layer = bn.BatchNorm1d(4, activation="relu", channel_dim=-1)
    assert logged(layer) == {"eps": 1e-5, "num_features": 4}
    assert to_group_norm(layer).num_channels == 4


class Scaled(bn.BatchNorm1d):
    def forward(self, x):
        return torch.relu((x - self.running_mean) / (self.running_var + self.eps).sqrt())


def test_a_subclass_may_use_eps_in_its_own_formula():
    x = randn(4, 3)
    ours = bn.BatchNorm1d(3, activation="relu").eval()
    torch.testing.assert_close(Scaled(3, activation="relu")(x), ours(x))


class Computed(bn.BatchNorm1d):
    @property
    def eps(self):
        return 3.0

    @eps.setter
    def eps(self, value):
        pass


def test_an_eps_that_a_subclass_computes_is_used():
    torch.testing.assert_close(Computed(3).eval()(torch.ones(2, 3)), torch.full((2, 3), 0.5))


def test_a_pickle_of_a_version_without_the_property_has_its_eps():
    layer, x = bn.BatchNorm1d(3, eps=0.5, activation="relu").eval(), randn(4, 3)
    state = layer.__getstate__()
    del state["_eps"]
    loaded = bn.BatchNorm1d.__new__(bn.BatchNorm1d)
    loaded.__setstate__(state)
    assert loaded.eps == 0.5
    assert torch.equal(loaded(x), layer(x))
