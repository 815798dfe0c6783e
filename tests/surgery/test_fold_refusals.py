"""`fold`: the batch norm layers that are left alone, each with its reason, and models that are refused."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

import batchnorm as bn
from support import assert_same_state, copied_state, randn


def settled(model):
    """Return a float64 model in eval mode whose parameters and statistics are random."""
    model = model.double().eval()
    for i, values in enumerate((*model.parameters(), *model.buffers())):
        if values.is_floating_point():
            values.data.copy_(randn(*values.shape, seed=i).abs() + 0.1)
    return model


def left_alone(model, x, *, example=True):
    """Fold a model whose layers are all left alone; return the reasons."""
    folded, report = bn.fold(model, x if example else None)
    assert report.layers == ()
    torch.testing.assert_close(folded(x), model(x), rtol=0, atol=0)
    assert_same_state(copied_state(folded), copied_state(model))
    folded.train()  # nothing was folded, so that nothing speaks against it
    return [row.reason for row in report.left]


class Net(nn.Module):
    """Layers by name, and a forward that is given."""

    def __init__(self, forward, **layers):
        super().__init__()
        for name, layer in layers.items():
            self.add_module(name, layer)
        self.steps = forward

    def forward(self, x):
        return self.steps(self, x)


def conv_net(forward):
    return settled(Net(forward, conv=nn.Conv2d(3, 3, 3, padding=1), norm=nn.BatchNorm2d(3)))


IMAGE, ROWS = (2, 3, 5, 5), (4, 3)


def x_of(shape):
    return randn(*shape, dtype=torch.float64)


# What is between.


@pytest.mark.parametrize(
    ("forward", "reason"),
    [
        (lambda net, x: net.norm(net.conv(x).relu()), "its input comes from relu, and its output goes to the output"),
        (lambda net, x: net.norm(net.conv(x) + x), "its input comes from add"),
        (lambda net, x: net.norm(torch.cat([net.conv(x)[:, :1], x[:, 1:]], 1)), "its input comes from cat"),
        (lambda net, x: net.norm(net.conv(x).transpose(2, 3)), "its input comes from transpose"),
        (lambda net, x: net.norm(net.conv(x).flatten(2).view(2, 3, 5, 5)), "its input comes from view"),
        (lambda net, x: net.norm(net.conv(x)) + net.conv.weight.sum(), "parameters or buffers of Conv2d are read"),
        (lambda net, x: net.norm(net.conv(x)) * net.norm.weight.sum(), "parameters or buffers of BatchNorm2d are read"),
        (lambda net, x: net.norm(y := net.conv(x)) + y, "the output of Conv2d also goes to add"),
        (lambda net, x: net.norm(net.conv(x)) + net.norm(x), "its input is the input of the model"),
        (lambda net, x: net.norm(net.conv(x)) + net.norm(net.conv(x).relu()), "its input comes from Conv2d and relu"),
        (lambda net, x: net.norm(net.conv(net.conv(x))), "the output of Conv2d also goes to Conv2d"),
        (lambda net, x: net.norm(net.conv(x)) + net.conv(x), "the output of Conv2d also goes to add"),
        (lambda net, x: torch.relu_(net.norm(net.conv(x).add_(1))), "its input comes from add_"),
        (lambda net, x: net.norm(net.conv(x).mul_(2)), "its input comes from mul_"),
        (lambda net, x: net.norm(nn.functional.dropout(net.conv(x) * 0, 0.5)), "its input comes from dropout"),
        (lambda net, x: net.norm(nn.functional.conv2d(x, net.conv.weight)), "its input comes from conv2d"),
        (lambda net, x: x * 2, "it is called 0 times on the example"),
    ],
)
def test_a_layer_is_left_where_something_is_between_or_sees_it(forward, reason):
    (found,) = left_alone(conv_net(forward), x_of(IMAGE))
    assert reason in found


def test_a_convolution_whose_output_is_changed_in_place_is_left():
    def forward(net, x):
        y = net.conv(x)
        y.add_(1)
        return net.norm(y)

    (reason,) = left_alone(conv_net(forward), x_of(IMAGE))
    assert reason.startswith("the output of Conv2d also goes to add_")


def test_an_output_that_the_forward_keeps_is_left():
    def forward(net, x):
        net.features = net.conv(x)
        return net.norm(net.features)

    (reason,) = left_alone(conv_net(forward), x_of(IMAGE))
    assert "keeps it as an attribute" in reason


def test_a_layer_whose_statistics_the_forward_reads_is_left():
    class Reading(nn.Sequential):
        def forward(self, x):
            return super().forward(x) * self.factor()

        def factor(self):
            return self[1].running_var.sum()

    model = settled(Reading(nn.Linear(3, 3), nn.BatchNorm1d(3)))
    assert left_alone(model, x_of(ROWS)) == ["the forward of Reading reads running statistics"]


def test_a_forward_may_read_the_settings_of_a_folded_layer_and_the_dtype_of_a_weight():
    class Careful(nn.Sequential):
        def forward(self, x):
            return self[1](self[0](x.to(self[0].weight.dtype))) * self[1].num_features

    model = settled(Careful(nn.Linear(3, 3), nn.BatchNorm1d(3)))
    folded, report = bn.fold(model, x_of(ROWS))
    assert len(report.layers) == 1
    torch.testing.assert_close(folded(x_of(ROWS)), model(x_of(ROWS)))


def test_padding_between_batch_norm_and_convolution_is_refused():
    for layer in (nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(3, 4, 3, padding="same"), nn.ConvTranspose2d(3, 4, 2, 2)):
        (reason,) = left_alone(settled(nn.Sequential(nn.BatchNorm2d(3), layer)), x_of(IMAGE))
        assert "convolution" in reason.partition("its output goes to ")[2]


def test_an_activation_of_batch_norm_stands_before_the_next_layer():
    model = settled(nn.Sequential(bn.BatchNorm1d(3, activation="silu"), nn.Linear(3, 2)))
    assert left_alone(model, x_of(ROWS)) == ["its input is the input of the model, and SiLU comes next"]


def test_a_residual_stands_between_batch_norm_and_the_next_layer():
    net = Net(lambda net, x: net.fc(net.norm(x, x)), fc=nn.Linear(3, 2), norm=bn.BatchNorm1d(3))
    assert left_alone(settled(net), x_of(ROWS)) == ["its input is the input of the model, and it adds a residual"]


def test_a_residual_that_is_the_output_of_the_convolution_is_refused():
    net = Net(lambda net, x: net.norm(y := net.fc(x), y), fc=nn.Linear(3, 3), norm=bn.BatchNorm1d(3))
    assert left_alone(settled(net), x_of(ROWS))[0].startswith("it adds its own input as residual")


def test_a_mask_is_refused():
    net = Net(lambda net, x: net.norm(net.fc(x), mask=x[:, 0] > 0), fc=nn.Linear(3, 3), norm=bn.BatchNorm1d(3))
    assert left_alone(settled(net), x_of(ROWS)) == ["it is called with a mask"]


# Channels.


def test_batch_norm_of_another_dimension_than_the_linear_layers_is_left_with_an_example():
    model = settled(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)))
    (reason,) = left_alone(model, x_of((2, 4, 3)))  # L == C, so that all shapes fit
    assert "it normalizes dimension 1 of (N, C, L), where the channels of Linear are not" in reason
    model = settled(nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 3)))
    (reason,) = left_alone(model, x_of((2, 4, 4)))
    assert "it normalizes dimension 1" in reason


def test_without_an_example_such_an_input_raises_instead_of_a_wrong_result():
    model = settled(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)))
    folded, report = bn.fold(model)
    assert len(report.layers) == 1
    torch.testing.assert_close(folded(x_of(ROWS)), model(x_of(ROWS)))
    with pytest.raises(bn.InputError, match=r"for inputs of 2 dimensions.*got shape \(2, 4, 4\)"):
        folded(x_of((2, 4, 3)))


def test_an_unbatched_input_of_a_convolution_raises_instead_of_a_wrong_result():
    model = settled(nn.Sequential(nn.Conv1d(3, 4, 2), nn.BatchNorm1d(4)))
    folded, _ = bn.fold(model)
    x = x_of((3, 5))  # gives (4, 4), which batch norm takes for 4 samples of 4 channels
    assert model(x).shape == (4, 4)
    with pytest.raises(bn.InputError, match="for inputs of 3 dimensions"):
        folded(x)


@pytest.mark.parametrize(
    ("model", "shape", "reason"),
    [
        (nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(4)), (2, 4, 3), "it normalizes 4 channels, where Linear has 5"),
        (nn.Sequential(nn.Linear(5, 6), nn.BatchNorm2d(3)), (2, 3, 5, 5), "normalizes 3 channels, where Linear has 6"),
        (nn.Sequential(nn.Linear(5, 3), nn.BatchNorm2d(3)), IMAGE, "it takes inputs of other numbers of dimensions"),
        (nn.Sequential(nn.Conv2d(3, 3, 1), bn.BatchNorm2d(5, channel_dim=-1)), IMAGE, "5 channels, where Conv2d has 3"),
        (nn.Sequential(nn.Conv2d(3, 5, 1), bn.BatchNorm2d(5, channel_dim=2)), IMAGE, "channels are in dimension 2"),
    ],
)
def test_channels_in_different_dimensions_are_refused(model, shape, reason):
    assert reason in left_alone(settled(model), x_of(shape))[0]


# The layers themselves.


def hooked(layer):
    layer.register_forward_hook(lambda module, args, output: output * 2)
    return layer


def with_another_forward(layer):
    layer.forward = torch.nn.functional.relu
    return layer


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda fc, norm: (hooked(fc), norm), "there are hooks on Linear"),
        (lambda fc, norm: (fc, hooked(norm)), "there are hooks on BatchNorm1d"),
        (lambda fc, norm: (parametrizations.weight_norm(fc), norm), "Linear is parametrized"),
        (lambda fc, norm: (parametrizations.spectral_norm(fc), norm), "Linear is parametrized"),
        (lambda fc, norm: (prune.random_unstructured(fc, "weight", 1), norm), "is computed before each forward"),
        (lambda fc, norm: (nn.utils.spectral_norm(fc), norm), "is computed before each forward"),
        (lambda fc, norm: (fc, prune.random_unstructured(norm, "weight", 1)), "there are hooks on BatchNorm1d"),
        (lambda fc, norm: (with_another_forward(fc), norm), "the forward of Linear was replaced by an assignment"),
        (lambda fc, norm: (fc, nn.BatchNorm1d(3, track_running_stats=False).double()), "keeps no running statistics"),
    ],
)
def test_a_layer_with_hooks_or_computed_weights_is_left(change, reason):
    model = settled(nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)))
    model = nn.Sequential(*change(*model)).eval()
    folded, report = bn.fold(model)
    assert report.layers == ()
    assert reason in report.left[0].reason
    torch.testing.assert_close(folded(x_of(ROWS)), model(x_of(ROWS)))


def test_a_parametrized_batch_norm_is_left():
    model = settled(nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)))
    nn.utils.parametrize.register_parametrization(model[1], "weight", nn.Softplus())
    assert len(left_alone(model, x_of(ROWS))) == 1


@pytest.mark.parametrize("side", ["before", "after"])
def test_tied_weights_are_left(side):
    first, second = nn.Linear(3, 3), nn.Linear(3, 3)
    second.weight = first.weight
    layers = [first, nn.BatchNorm1d(3)] if side == "before" else [nn.BatchNorm1d(3), first]
    model = settled(nn.Sequential(*layers, nn.ReLU(), second))
    assert "the weights of Linear are tied to those of another module" in left_alone(model, x_of(ROWS))[0]


def test_a_shared_batch_norm_is_left():
    norm = nn.BatchNorm1d(3)
    model = settled(nn.Sequential(nn.Linear(3, 3), norm, nn.ReLU(), nn.Linear(3, 3), norm, nn.ReLU()))
    assert left_alone(model, x_of(ROWS)) == [
        "it is called 2 times, beside different layers, and its output goes to ReLU"
    ]


def test_a_shared_convolution_with_batch_norms_of_its_own_is_left():
    conv = nn.Conv2d(3, 3, 1)
    model = settled(nn.Sequential(conv, nn.BatchNorm2d(3), nn.ReLU(), conv, nn.BatchNorm2d(3), nn.ReLU()))
    reasons = left_alone(model, x_of(IMAGE))
    assert [reason.partition(", and")[0] for reason in reasons] == ["the output of Conv2d also goes to BatchNorm2d"] * 2


def test_an_activation_in_the_forward_of_a_layer_is_no_part_of_its_class():
    class Activated(nn.Conv2d):
        def forward(self, x):
            return super().forward(x).relu()

    model = settled(nn.Sequential(Activated(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU()))
    assert "the forward of Activated is its own" in left_alone(model, x_of(IMAGE))[0]


def test_statistics_that_are_not_finite_are_left():
    model = settled(nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)))
    model[1].running_mean[0] = torch.nan
    _, report = bn.fold(model)
    assert report.left[0].reason == "its scale or shift is not finite"


def test_a_dtype_that_cannot_hold_the_folded_weights_is_left():
    model = settled(nn.Sequential(nn.Linear(3, 3), bn.BatchNorm1d(3, eps=1e-12))).half()
    model[1].running_var.fill_(1e-12)
    _, report = bn.fold(model)
    assert "the folded weight or bias is not finite in torch.float16" in report.left[0].reason


def test_parameters_on_the_meta_device_are_left():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.ReLU(), nn.Linear(3, 3)).eval()
    _, report = bn.fold(model)
    assert report.left[0].reason == "it is on the meta device, where it has no values"


def test_a_layer_that_is_adapted_to_each_batch_is_left():
    model = settled(nn.Sequential(nn.Linear(3, 3), bn.BatchNorm1d(3)))
    with bn.adapt(model):
        _, report = bn.fold(model)
    assert report.left[0].reason == "it is adapted to each batch by itself"


def test_the_statistics_of_the_domain_in_force_are_folded_and_the_report_names_the_others():
    model = settled(nn.Sequential(nn.Linear(3, 3), bn.BatchNorm1d(3)))
    bn.add_domains(model, ["a", "b"])
    model[1].running_mean_a.fill_(5)
    with bn.use_domain(model, "a"):
        folded, report = bn.fold(model)
        expected = model(x_of(ROWS))
    torch.testing.assert_close(folded(x_of(ROWS)), expected)
    assert report.layers[0].lost == ("domains=['a', 'b']",)


# Forwards that cannot be read.


class Tapped(nn.Module):
    """Runs the parts of a child one by one, keeps some of their outputs, and cannot be traced."""

    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU())

    def forward(self, x):
        kept = []
        for layer in self.features:
            x = layer(x)
            kept.append(x)
        return sum(kept) if x.sum() > 0 else x


def test_parts_that_an_unread_forward_may_run_one_by_one_are_left():
    model = settled(Tapped())
    (reason,) = left_alone(model, x_of(IMAGE), example=False)
    assert reason.startswith("Tapped cannot be read")
    (reason,) = left_alone(model, x_of(IMAGE))
    assert reason.startswith("the output of Conv2d also goes to add")


def test_a_child_that_an_unread_forward_calls_as_a_whole_is_folded():
    class Whole(Tapped):
        def forward(self, x):
            y = self.features(x)
            return y if y.sum() > 0 else -y

    model = settled(Whole())
    folded, report = bn.fold(model)
    assert len(report.layers) == 1
    torch.testing.assert_close(folded(x_of(IMAGE)), model(x_of(IMAGE)))


def test_hooks_on_a_block_between_convolution_and_batch_norm_are_respected():
    model = settled(nn.Sequential(hooked(nn.Sequential(nn.Conv2d(3, 3, 1))), nn.BatchNorm2d(3)))
    (reason,) = left_alone(model, x_of(IMAGE))
    assert "hooks" in reason


# Models that are refused.


def test_a_model_without_batch_norm_is_refused():
    with pytest.raises(
        bn.InputError, match="fold needs a model with batch normalization layers; Sequential has 1 LayerNorm"
    ):
        bn.fold(nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3)))


def test_something_else_than_a_module_is_refused():
    with pytest.raises(bn.InputTypeError, match=r"fold takes a torch\.nn\.Module"):
        bn.fold({"weight": torch.ones(3)})


def test_a_lazy_layer_is_left_and_the_others_are_folded():
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.ReLU(), nn.LazyLinear(3), nn.LazyBatchNorm1d())
    _, report = bn.fold(model)
    assert [row.path for row in report.layers] == ["1"]
    assert [row.path for row in report.left] == ["4"]
    with pytest.raises(bn.InputError, match="must be initialized before it runs"):
        bn.fold(model, randn(*ROWS))


@pytest.mark.parametrize("inplace", [False, True])
def test_an_example_of_the_wrong_shape_leaves_the_model_as_it_was(inplace):
    model = settled(nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)))
    before, modes = copied_state(model), [module.training for module in model.modules()]
    with pytest.raises(bn.InputError, match="example must be an input that the model takes"):
        bn.fold(model, randn(2, 4), inplace=inplace)
    assert_same_state(copied_state(model), before)
    assert [module.training for module in model.modules()] == modes
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_partial_folding_is_a_result():
    model = settled(nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.ReLU(), nn.BatchNorm1d(3), nn.Tanh()))
    folded, report = bn.fold(copy.deepcopy(model), x_of(ROWS))
    assert repr(report).startswith("Surgery(1 layer changed, 1 left alone, largest difference")
    assert str(report).splitlines()[4] == "- BatchNorm1d at 3: its input comes from ReLU, and its output goes to Tanh"
    torch.testing.assert_close(folded(x_of(ROWS)), model(x_of(ROWS)))
    with pytest.raises(bn.UnsupportedError):
        folded.train()
