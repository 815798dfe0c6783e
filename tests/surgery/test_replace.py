"""Batch normalization replaced by other layers: what is kept, what is refused, and that samples are independent."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize, prune

import batchnorm as bn
from support import randn

KINDS = ["group", "layer", "instance", "identity"]


class Frozen(nn.Module):
    """FrozenBatchNorm2d as torchvision has it: all is buffers."""

    def __init__(self, channels, eps=1e-5):
        super().__init__()
        self.eps = eps
        for name, value in {"weight": 1.0, "bias": 0.0, "running_mean": 0.0, "running_var": 1.0}.items():
            self.register_buffer(name, torch.full((channels,), value))

    def forward(self, x):
        scale = self.weight * (self.running_var + self.eps).rsqrt()
        shift = self.bias - self.running_mean * scale
        return x * scale[:, None, None] + shift[:, None, None]


def changed(layer):
    """Return the layer with gamma and beta other than those of a new layer."""
    with torch.no_grad():
        for values in (layer.weight, layer.bias):
            values += torch.rand(values.shape, generator=torch.Generator().manual_seed(0))
    return layer


def network(norm=nn.BatchNorm2d, channels=8, **options):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, channels, 3),
        changed(norm(channels, **options)),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(channels * 36, 2),
    )


def replaced(model, with_, **options):
    return bn.replace(model, with_, **options)[0]


def left(model, with_, **options):
    """Return the reason for which the only layer is left, and check that it is still there."""
    new, report = bn.replace(model, with_, **options)
    assert report.layers == ()
    (only,) = report.left
    assert type(new.get_submodule(only.path)) is type(model.get_submodule(only.path))
    return only.reason


# The new layers.


@pytest.mark.parametrize("norm", [nn.BatchNorm2d, bn.BatchNorm2d, Frozen, nn.SyncBatchNorm, bn.BatchNorm], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_layers_of_every_library_are_replaced_and_samples_are_independent(kind, norm):
    model, x = network(norm), randn(4, 3, 8, 8)
    new = replaced(model, kind, example=x).train()
    assert not any(isinstance(module, norm) for module in new.modules())
    torch.testing.assert_close(new(x)[:1], new(x[:1]), rtol=1e-5, atol=1e-5)  # sums of 36 float32 values, in any order


@pytest.mark.parametrize("kind", ["group", "layer", "instance"])
def test_a_batch_of_one_trains(kind):
    model = replaced(network(), kind, example=randn(2, 3, 8, 8))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0003)
    losses = []
    for _ in range(5):
        loss = (model(randn(1, 3, 8, 8)) - 1).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses == sorted(losses, reverse=True)


def by_hand(x, gamma, beta, eps, groups):
    """Return x normalized within groups of channels of each sample, in float64."""
    grouped = x.double().reshape(x.shape[0], groups, -1)
    normalized = (grouped - grouped.mean(-1, keepdim=True)) / (grouped.var(-1, keepdim=True, correction=0) + eps).sqrt()
    return normalized.reshape(x.shape) * gamma.double()[:, None, None] + beta.double()[:, None, None]


@pytest.mark.parametrize(("kind", "groups"), [("group", 2), ("layer", 1), ("instance", 8)])
def test_a_new_layer_computes_its_formula_with_the_same_gamma_beta_and_eps(kind, groups):
    layer, x = changed(nn.BatchNorm2d(8, eps=0.1)), randn(2, 8, 3, 3) * 3 + 1
    new = replaced(layer, kind)
    expected = by_hand(x, layer.weight, layer.bias, 0.1, groups)
    torch.testing.assert_close(new(x).double(), expected, rtol=1e-5, atol=1e-5)  # roundings of float32 values below 10


def test_layer_normalization_of_two_dimensions_is_torchs_over_the_channels():
    layer, x = changed(nn.BatchNorm1d(8)), randn(5, 8)
    expected = nn.functional.layer_norm(x, (8,), layer.weight, layer.bias, layer.eps)
    torch.testing.assert_close(replaced(layer, "layer")(x), expected)


def test_identity_returns_the_input_and_the_report_says_that_gamma_and_beta_are_lost():
    new, report = bn.replace(network(), "identity")
    assert type(new[1]) is nn.Identity
    assert report.layers[0].lost == ("weight", "bias")


# The size of groups.


def test_the_recipe_with_the_greatest_common_divisor_returns_noise_and_ours_does_not():
    x = randn(4, 32)
    recipe = nn.GroupNorm(math.gcd(32, 32), 32)
    assert recipe(x).abs().max() < 1e-3  # rounding errors, divided by the root of eps, whatever x is
    new = replaced(nn.BatchNorm1d(32), "group")
    assert new.num_groups == 2
    assert new(x).std() > 0.9
    assert "a group of (N, 32) has 1 value per sample, and all of them become 0" in left(
        nn.Sequential(nn.BatchNorm1d(32)), "group", num_groups=32
    )


@pytest.mark.parametrize(
    ("channels", "expected"),
    [(3, 1), (6, 1), (8, 2), (13, 1), (24, 6), (30, 6), (64, 16), (100, 25), (96, 24), (256, 32)],
)
def test_the_groups_of_2d_layers_divide_the_channels_and_have_four_or_more(channels, expected):
    new = replaced(nn.BatchNorm2d(channels), "group")
    assert new.num_groups == expected
    assert new(randn(2, channels, 2, 2)).isfinite().all()


@pytest.mark.parametrize(("channels", "expected"), [(8, 1), (32, 2), (64, 4), (100, 5), (1024, 32)])
def test_the_groups_of_1d_layers_have_sixteen_channels_or_more(channels, expected):
    assert replaced(nn.BatchNorm1d(channels), "group").num_groups == expected


def test_an_example_shows_that_a_1d_layer_has_positions():
    model = nn.Sequential(nn.Conv1d(2, 32, 3), nn.BatchNorm1d(32))
    assert replaced(model, "group", example=randn(2, 2, 10))[1].num_groups == 8
    assert type(replaced(model, "instance", example=randn(2, 2, 10))[1]) is nn.InstanceNorm1d


def test_an_example_shows_that_a_2d_layer_has_one_position():
    model = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.BatchNorm2d(32))
    assert replaced(model, "group", example=randn(2, 32, 4, 4))[1].num_groups == 2
    reason = left(model, "group", channels_per_group=2, example=randn(2, 32, 4, 4))
    assert reason == "a group of input (2, 32, 1, 1) has 2 values per sample, and nothing but their order is left"
    assert "a channel of input (2, 32, 1, 1) has 1 value" in left(model, "instance", example=randn(2, 32, 4, 4))


def test_the_smallest_of_several_calls_decides():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm2d(32)

        def forward(self, x):
            return self.norm(x).mean() + self.norm(x.mean((2, 3), keepdim=True)).mean()

    assert replaced(Twice(), "group", example=randn(2, 32, 4, 4)).norm.num_groups == 2


def test_groups_can_be_given_by_their_number_or_size():
    assert replaced(nn.BatchNorm2d(24), "group", num_groups=3).num_groups == 3
    assert replaced(nn.BatchNorm2d(24), "group", channels_per_group=3).num_groups == 8


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_groups": 5}, "5 groups do not divide its 24 channels"),
        ({"channels_per_group": 16}, "groups of 16 channels do not divide its 24 channels"),
    ],
    ids=str,
)
def test_a_layer_whose_channels_cannot_be_divided_so_is_left_with_the_reason(options, message):
    assert left(nn.Sequential(nn.BatchNorm2d(24)), "group", **options) == message


@pytest.mark.parametrize(("kind", "channels"), [("group", 2), ("layer", 2), ("group", 1), ("layer", 1)])
def test_one_or_two_channels_without_positions_are_never_a_group(kind, channels):
    assert "per sample" in left(nn.Sequential(nn.BatchNorm1d(channels)), kind)


@pytest.mark.parametrize("norm", [nn.BatchNorm1d, nn.SyncBatchNorm, bn.BatchNorm], ids=str)
def test_instance_norm_needs_to_know_that_there_are_positions(norm):
    assert left(nn.Sequential(norm(8)), "instance") == "its number of dimensions is not known; give an example"
    assert "a channel of input (4, 8) has 1 value" in left(
        nn.Sequential(bn.BatchNorm(8)), "instance", example=randn(4, 8)
    )


# What is kept.


def test_inplace_keeps_the_parameters_and_an_optimizer_goes_on():
    model = network()
    weight, bias = model[1].weight, model[1].bias
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    new, report = bn.replace(model, "group", inplace=True)
    assert new is model
    assert model[1].weight is weight
    assert model[1].bias is bias
    assert {*new.parameters()} == {*optimizer.param_groups[0]["params"]}
    assert not any("optimizer" in note for note in report.notes)


def test_a_copy_leaves_the_model_as_it_was():
    model = network()
    before = copy.deepcopy(model.state_dict())
    new, report = bn.replace(model, "group", example=randn(2, 3, 8, 8))
    assert type(model[1]) is nn.BatchNorm2d
    assert new[1].weight is not model[1].weight
    assert torch.equal(new[1].weight, model[1].weight)
    assert before.keys() == model.state_dict().keys()
    assert all(torch.equal(before[name], values) for name, values in model.state_dict().items())
    assert any("make a new optimizer" in note for note in report.notes)


@pytest.mark.parametrize("kind", ["group", "layer", "instance"])
def test_names_dtype_mode_and_requires_grad_are_kept(kind):
    model = network().double()
    model[1].weight.requires_grad_(False)
    model[1].eval()
    new = replaced(model, kind)
    names = [name for name in model.state_dict() if "running" not in name and "num_batches" not in name]
    assert [*new.state_dict()] == names
    assert (new[1].training, new.training) == (False, True)
    assert (new[1].weight.requires_grad, new[1].bias.requires_grad) == (False, True)
    assert new[1].weight.dtype == torch.float64


@pytest.mark.parametrize("kind", ["group", "layer", "instance"])
@pytest.mark.parametrize("options", [{"affine": False}, {"bias": False}], ids=str)
def test_gamma_and_beta_that_a_layer_lacks_are_lacking_afterwards(kind, options):
    new, report = bn.replace(bn.BatchNorm2d(8, **options), kind)
    assert {*dict(new.named_parameters())} == ({"weight"} if "bias" in options else set())
    assert new(randn(2, 8, 3, 3)).isfinite().all()
    assert report.layers[0].lost == ()


def test_the_buffers_of_a_frozen_layer_become_parameters_without_gradient():
    model = nn.Sequential(changed(Frozen(8)))
    new, report = bn.replace(model, "group")
    assert torch.equal(new[0].weight, model[0].weight)
    assert not new[0].weight.requires_grad
    assert report.layers[0].lost == ("frozen_statistics=True",)


def test_a_shared_layer_is_shared_afterwards():
    layer = nn.BatchNorm2d(8)
    new, report = bn.replace(nn.ModuleList([layer, nn.Sequential(layer), nn.BatchNorm2d(8)]), "group")
    assert new[0] is new[1][0]
    assert new[0] is not new[2]
    assert [done.path for done in report.layers] == ["0", "2"]


def test_hooks_are_called_once_and_their_handles_remove_them():
    model, calls = network(), []
    handles = [
        model[1].register_forward_hook(lambda *_: calls.append("forward")),
        model[1].register_forward_pre_hook(lambda *_: calls.append("pre")),
        model[1].register_full_backward_hook(lambda *_: calls.append("backward")),
    ]
    bn.replace(model, "group", inplace=True)
    model(randn(2, 3, 8, 8)).sum().backward()
    assert calls == ["pre", "forward", "backward"]
    for handle in handles:
        handle.remove()
    model(randn(2, 3, 8, 8)).sum().backward()
    assert len(calls) == 3


def test_an_activation_of_ours_runs_after_the_new_layer_and_output_hooks_see_it():
    model, seen = nn.Sequential(changed(bn.BatchNorm2d(8, activation="relu"))), []
    model[0].register_forward_hook(lambda _, arguments, output: seen.append(output.min().item()))
    new, report = bn.replace(model, "group", inplace=True)
    assert [type(module) for module in new[0]] == [nn.GroupNorm, nn.ReLU]
    assert report.layers[0].after == "GroupNorm(2, 8), ReLU"
    assert new(randn(2, 8, 3, 3)).min() == 0
    assert seen == [0]


def test_the_layer_itself_is_returned_replaced():
    assert type(replaced(nn.BatchNorm2d(8), "instance")) is nn.InstanceNorm2d


# A function of one's own.


def test_a_function_gets_each_layer_and_its_norm_takes_gamma_and_beta():
    model = network(channels=6).double()
    got = []

    def factory(layer):
        got.append(layer)
        return nn.GroupNorm(3, layer.num_features, eps=0.25)

    new, report = bn.replace(model, factory, inplace=True)
    assert [type(layer) for layer in got] == [nn.BatchNorm2d]
    assert new[1].weight is got[0].weight
    assert (new[1].eps, new[1].weight.dtype) == (0.25, torch.float64)
    assert report.layers[0].lost == ()


def test_values_that_a_function_set_are_kept_and_the_loss_is_reported():
    def factory(layer):
        made = nn.GroupNorm(2, layer.num_features)
        nn.init.zeros_(made.weight)
        return made

    new, report = bn.replace(network(), factory)
    assert new[1].weight.abs().sum() == 0
    assert report.layers[0].lost == ("weight", "bias")


def test_the_weight_of_a_module_that_is_no_norm_means_something_else_and_is_kept():
    def factory(layer):
        return nn.PReLU(layer.num_features, init=1.0)

    new, _ = bn.replace(network(), factory)
    assert torch.equal(new[1].weight, torch.ones(8))


def test_a_function_leaves_a_layer_by_returning_none():
    model = nn.Sequential(nn.BatchNorm2d(8), nn.BatchNorm2d(16))
    new, report = bn.replace(model, lambda layer: None if layer.num_features == 8 else nn.GroupNorm(4, 16))
    assert [type(module) for module in new] == [nn.BatchNorm2d, nn.GroupNorm]
    assert [(each.path, each.reason) for each in report.left] == [("0", "the function returned None for it")]


@pytest.mark.parametrize(("returned", "error"), [(3, bn.InputTypeError), (nn.Identity, bn.InputTypeError)], ids=str)
def test_a_function_that_returns_no_module_is_an_error_and_the_model_is_untouched(returned, error):
    model = network()
    with pytest.raises(error, match=r"must return a module or None; got .* for 1"):
        bn.replace(model, lambda layer: returned, inplace=True)
    assert type(model[1]) is nn.BatchNorm2d


def test_one_module_for_several_layers_is_an_error():
    made = nn.GroupNorm(2, 8)
    with pytest.raises(bn.InputError, match="a new module for each layer; got the one of an earlier layer for 1"):
        bn.replace(nn.Sequential(nn.BatchNorm2d(8), nn.BatchNorm2d(8)), lambda layer: made)


# Layers that are left.


def test_layers_whose_formula_is_not_known_are_left_with_the_reason():
    class Noisy(nn.BatchNorm2d):
        def forward(self, x):
            return super().forward(x).sin() * 2

    pruned, parametrized = nn.BatchNorm2d(8), nn.BatchNorm2d(8)
    prune.l1_unstructured(pruned, "weight", 0.5)
    parametrize.register_parametrization(parametrized, "weight", nn.Softplus())
    model = nn.Sequential(Noisy(8), pruned, parametrized, bn.LazyBatchNorm2d(), bn.BatchNorm2d(8, channel_dim=-1))
    kinds = [type(module) for module in model]
    _, report = bn.replace(model, "group", inplace=True)
    assert report.layers == ()
    assert [type(module) for module in model] == kinds
    assert "its own forward" in report.left[0].reason
    assert ["computed" in each.reason for each in report.left] == [False, True, True, False, False]
    assert report.left[3].reason == "it is lazy and has seen no batch, which sets its channels"
    assert report.left[4].reason.startswith("it has channel_dim=-1")


def test_a_layer_that_is_called_with_a_residual_is_left():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.other = bn.BatchNorm2d(8), bn.BatchNorm2d(8)

        def forward(self, x):
            return self.norm(self.other(x), residual=x)

    _, report = bn.replace(Block(), "group", example=randn(2, 8, 3, 3))
    assert [(each.path, each.reason) for each in report.left] == [
        ("norm", "it is called with residual= or mask=, which other layers do not take")
    ]
    assert [each.path for each in report.layers] == ["other"]


# Errors.


@pytest.mark.parametrize(
    ("with_", "options", "message"),
    [
        ("batch", {}, r"with_ must be 'group', 'layer', 'instance', 'identity' or a function; got 'batch'"),
        ("group", {"num_groups": 0}, "num_groups must be None or a whole number from 1; got 0"),
        ("group", {"channels_per_group": 2.0}, "channels_per_group must be None or a whole number from 1; got 2.0"),
        ("group", {"num_groups": 2, "channels_per_group": 4}, "exclude each other"),
        ("layer", {"num_groups": 2}, "num_groups is an option of with_='group'; got with_='layer'"),
    ],
    ids=str,
)
def test_options_out_of_their_range_are_errors(with_, options, message):
    with pytest.raises(bn.InputError, match=message):
        bn.replace(network(), with_, **options)


@pytest.mark.parametrize("wrong", [nn.InstanceNorm2d, nn.Identity(), None, 3], ids=str)
def test_a_class_or_a_module_is_no_function_of_a_layer(wrong):
    with pytest.raises(bn.InputTypeError, match="or a function from a layer to a new module; got"):
        bn.replace(network(), wrong)


def test_a_model_without_batch_normalization_is_an_error_that_says_what_there_is():
    with pytest.raises(bn.InputError, match="1 LayerNorm"):
        bn.replace(nn.Sequential(nn.LayerNorm(3)), "group")


@pytest.mark.parametrize("inplace", [False, True])
def test_a_model_that_looks_into_its_layers_fails_on_the_example_and_stays_as_it_was(inplace):
    class Reader(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm2d(8)

        def forward(self, x):
            return self.norm(x) + self.norm.running_mean.sum()

    model = Reader()
    with pytest.raises(bn.UnsupportedError, match=r"with its new layers.*running_mean"):
        bn.replace(model, "group", inplace=inplace, example=randn(2, 8, 3, 3))
    assert type(model.norm) is nn.BatchNorm2d


@pytest.mark.parametrize("inplace", [False, True])
def test_the_report_has_the_difference_on_the_example(inplace):
    model, x = network().eval(), randn(2, 3, 8, 8)
    before = model(x)
    new, report = bn.replace(model, "group", inplace=inplace, example=x)
    assert report.max_difference == pytest.approx((new(x) - before).abs().max().item(), rel=1e-5)
    assert report.max_difference > 0.01
