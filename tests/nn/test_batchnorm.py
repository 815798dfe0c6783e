"""The layers give the results of torch's own."""

import copy
import pickle

import pytest
import torch

import batchnorm as bn
from support import needs_torchs_bias

CASES = {
    "(N, C)": (bn.BatchNorm1d, torch.nn.BatchNorm1d, (16, 6)),
    "(N, C, L)": (bn.BatchNorm1d, torch.nn.BatchNorm1d, (8, 6, 5)),
    "(N, C, H, W)": (bn.BatchNorm2d, torch.nn.BatchNorm2d, (4, 6, 5, 3)),
    "(N, C, D, H, W)": (bn.BatchNorm3d, torch.nn.BatchNorm3d, (3, 6, 2, 5, 3)),
    "any (N, C, H, W)": (bn.BatchNorm, torch.nn.BatchNorm2d, (4, 6, 5, 3)),
}
OPTIONS = {
    "defaults": {},
    "momentum=None": {"momentum": None},
    "momentum=0.3": {"momentum": 0.3},
    "affine=False": {"affine": False},
    "bias=False": pytest.param({"bias": False}, marks=needs_torchs_bias),
    "track_running_stats=False": {"track_running_stats": False},
    "eps=0.1": {"eps": 0.1},
}


def train(layer, shape):
    """Train for 50 steps of gradient descent on a loss of the layer's output, and return the output of each step."""
    generator = torch.Generator().manual_seed(1)
    outputs = []
    for _ in range(50):
        x = (3 * torch.randn(shape, generator=generator) + 2).requires_grad_()
        y = layer(x)
        direction = torch.randn(shape, generator=generator)
        layer.zero_grad()
        (y * direction).mean().backward()
        outputs += [y.detach(), x.grad]
        with torch.no_grad():
            for parameter in layer.parameters():
                parameter -= 0.1 * parameter.grad
    layer.eval()
    return [*outputs, layer(torch.randn(shape, generator=generator)).detach()]


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_equal_to_torch_within_1e_6_over_50_steps(case, options):
    ours, theirs, shape = case
    one, other = ours(6, **options), theirs(6, **options)
    for mine, torchs in zip(train(one, shape), train(other, shape), strict=True):
        torch.testing.assert_close(mine, torchs, rtol=1e-6, atol=1e-6)
    assert one.state_dict().keys() == other.state_dict().keys()
    for name, value in other.state_dict().items():
        torch.testing.assert_close(one.state_dict()[name], value, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_state_dicts_load_strictly_both_ways(options):
    one, other = bn.BatchNorm2d(6, **options), torch.nn.BatchNorm2d(6, **options)
    one(torch.randn(4, 6, 2, 2))
    other.load_state_dict(one.state_dict(), strict=True)
    fresh = bn.BatchNorm2d(6, **options)
    fresh.load_state_dict(other.state_dict(), strict=True)
    for name, value in one.state_dict().items():
        assert torch.equal(fresh.state_dict()[name], value)


def test_they_are_torchs_own_classes_too():
    assert isinstance(bn.BatchNorm1d(2), torch.nn.BatchNorm1d)
    assert isinstance(bn.BatchNorm2d(2), torch.nn.BatchNorm2d)
    assert isinstance(bn.BatchNorm3d(2), torch.nn.BatchNorm3d)
    assert isinstance(bn.BatchNorm(2), torch.nn.modules.batchnorm._BatchNorm)


def test_the_repr_is_torchs_with_the_activation_where_there_is_one():
    assert repr(bn.BatchNorm2d(3)) == repr(torch.nn.BatchNorm2d(3))
    assert repr(bn.BatchNorm2d(3, activation="relu")).endswith("track_running_stats=True, activation='relu')")


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_a_copy_goes_on_as_the_layer_does(copied):
    layer = bn.BatchNorm1d(3, activation="tanh")
    layer(torch.randn(8, 3))
    twin = copied(layer)
    x = torch.randn(8, 3)
    assert torch.equal(twin(x), layer(x))
    assert torch.equal(twin.running_var, layer.running_var)
    assert int(twin.num_batches_tracked) == 2


@pytest.mark.parametrize("activation", ["relu", "leaky_relu", "silu", "gelu", "tanh", "sigmoid"])
def test_the_residual_is_added_before_the_activation(activation):
    x, residual = torch.randn(8, 3, 4), torch.randn(8, 3, 4)
    y = bn.BatchNorm1d(3, activation=activation)(x, residual)
    function = getattr(torch.nn.functional, activation)
    torch.testing.assert_close(y, function(torch.nn.BatchNorm1d(3)(x) + residual), rtol=1e-5, atol=1e-6)


def test_eval_normalizes_a_single_row():
    layer = bn.BatchNorm1d(3).eval()
    assert layer(torch.ones(1, 3)).shape == (1, 3)


def test_training_between_an_eval_forward_and_its_backward_changes_no_gradient():
    layer, x = bn.BatchNorm1d(3).eval(), torch.randn(8, 3, requires_grad=True)
    (expected,) = torch.autograd.grad(layer(x).square().sum(), x)
    y = layer(x).square().sum()
    layer.train()(torch.randn(8, 3) + 5)
    (gradient,) = torch.autograd.grad(y, x)
    assert torch.equal(gradient, expected)


def test_wrong_input_is_a_value_error():
    for layer, x in [(bn.BatchNorm2d(3), torch.ones(4, 3)), (bn.BatchNorm(3), torch.ones(3))]:
        with pytest.raises(ValueError, match=r"expected 4D|at least 2 dim"):
            layer(x)
    with pytest.raises(ValueError, match=r"num_features=3 channels .*; got 4, in shape \(2, 4\)"):
        bn.BatchNorm1d(3)(torch.ones(2, 4))
    with pytest.raises(bn.InputError, match="got 'swish'"):
        bn.BatchNorm1d(3, activation="swish")
