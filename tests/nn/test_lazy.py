"""Lazy layers infer the number of channels from their first batch, as torch's do."""

import copy
import pickle

import pytest
import torch
from torch import nn

import batchnorm as bn
from support import needs_torchs_bias

CASES = {
    "1d": (bn.LazyBatchNorm1d, nn.LazyBatchNorm1d, bn.BatchNorm1d, (6, 3, 4)),
    "2d": (bn.LazyBatchNorm2d, nn.LazyBatchNorm2d, bn.BatchNorm2d, (6, 3, 4, 2)),
    "3d": (bn.LazyBatchNorm3d, nn.LazyBatchNorm3d, bn.BatchNorm3d, (6, 3, 2, 4, 2)),
    "any": (bn.LazyBatchNorm, nn.LazyBatchNorm2d, bn.BatchNorm, (6, 3, 4, 2)),
}
OPTIONS = {
    "defaults": {},
    "affine=False": {"affine": False},
    "bias=False": pytest.param({"bias": False}, marks=needs_torchs_bias),
    "track_running_stats=False": {"track_running_stats": False},
    "eps, momentum": {"eps": 0.1, "momentum": None},
    "dtype=float64": {"dtype": torch.float64},
}
OURS = {
    "activation": {"activation": "silu"},
    "channel_dim=-1": {"channel_dim": -1},
    "small_batch": {"small_batch": "running"},
    "nonfinite": {"nonfinite": "propagate"},
    "virtual_batch_size": {"virtual_batch_size": 2},
    "renorm": {"renorm": bn.Renorm(2.0, 1.0)},
    "unbiased": {"unbiased": False},
    "dtype=bfloat16": {"dtype": torch.bfloat16},
}


def uninitialised(layer):
    return isinstance(layer, nn.modules.lazy.LazyModuleMixin) and layer.has_uninitialized_params()


def assert_same_states(one, other):
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert value.dtype == other[name].dtype
        assert torch.equal(value, other[name]), name


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_the_first_batch_makes_it_the_layer_that_is_not_lazy(case):
    lazy, _, kind, shape = case
    layer = lazy()
    layer(torch.randn(shape))
    assert type(layer) is kind
    assert layer.num_features == 3
    assert repr(layer) == repr(kind(3))


@pytest.mark.parametrize("dimensions", ["1d", "2d", "3d"])
def test_before_the_first_batch_it_is_torchs_lazy_class_too(dimensions):
    ours, theirs, *_ = CASES[dimensions]
    assert isinstance(ours(), theirs)
    assert repr(ours()) == repr(theirs())


@pytest.mark.parametrize("shape", [(6, 3), (6, 3, 4), (6, 3, 4, 2), (2, 3, 2, 2, 2, 2)])
def test_the_one_of_any_dimensions_takes_them_all(shape):
    layer = bn.LazyBatchNorm()
    assert layer(torch.randn(shape)).shape == shape
    assert layer.num_features == 3


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_outputs_and_states_are_those_of_torchs_lazy_layer(case, options):
    ours, theirs, _, shape = case
    one, other = ours(**options), theirs(**options)
    for _ in range(3):
        x = torch.randn(shape, dtype=options.get("dtype")) * 2 + 1
        # float32: some 10 roundings of 6e-8 in values up to about 8
        torch.testing.assert_close(one(x), other(x), rtol=1e-6, atol=4e-6)
    torch.testing.assert_close(one.state_dict(), other.state_dict(), rtol=1e-6, atol=1e-6)
    x = torch.randn(shape, dtype=options.get("dtype"))
    torch.testing.assert_close(one.eval()(x), other.eval()(x), rtol=1e-6, atol=4e-6)


@pytest.mark.parametrize("options", (OPTIONS | OURS).values(), ids=OPTIONS | OURS)
def test_options_are_kept(options):
    lazy, layer = bn.LazyBatchNorm1d(**options), bn.BatchNorm1d(3, **options)
    x = torch.randn(6, 3, 3, dtype=options.get("dtype")) * 2 + 1
    assert torch.equal(lazy(x), layer(x))
    assert repr(lazy) == repr(layer)
    assert_same_states(lazy.state_dict(), layer.state_dict())


@pytest.mark.parametrize("channel_dim", [-1, 2, 0])
def test_the_number_of_channels_is_the_size_of_channel_dim(channel_dim):
    layer = bn.LazyBatchNorm(channel_dim=channel_dim)
    layer(torch.randn(4, 5, 6))
    assert layer.num_features == (4, 5, 6)[channel_dim]
    assert layer.running_mean.shape == layer.weight.shape == (layer.num_features,)


def test_bfloat16_keeps_float32_statistics():
    layer = bn.LazyBatchNorm1d(dtype=torch.bfloat16)
    layer(torch.randn(8, 3, dtype=torch.bfloat16))
    assert (layer.weight.dtype, layer.running_mean.dtype, layer.running_var.dtype) == (
        torch.bfloat16,
        torch.float32,
        torch.float32,
    )


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_states_load_strictly_both_ways_before_the_first_batch(options):
    ours, theirs = bn.LazyBatchNorm2d(**options), nn.LazyBatchNorm2d(**options)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    ours(torch.randn(4, 3, 2, 2, dtype=options.get("dtype")))
    assert ours.num_features == 3


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_states_load_strictly_both_ways_after_the_first_batch(options):
    ours, theirs = bn.LazyBatchNorm2d(**options), nn.BatchNorm2d(3, **options)
    ours(torch.randn(4, 3, 2, 2, dtype=options.get("dtype")))
    theirs.load_state_dict(ours.state_dict(), strict=True)
    fresh = bn.BatchNorm2d(3, **options)
    fresh.load_state_dict(theirs.state_dict(), strict=True)
    assert_same_states(fresh.state_dict(), ours.state_dict())


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_a_state_of_a_trained_layer_goes_on_in_a_lazy_one(options, assign):
    source, lazy = nn.BatchNorm2d(3, **options), bn.LazyBatchNorm2d(**options)
    x = torch.randn(4, 3, 2, 2, dtype=options.get("dtype")) + 2
    source(x)
    lazy.load_state_dict(copy.deepcopy(source.state_dict()), strict=True, assign=assign)
    torch.testing.assert_close(lazy(x), source(x), rtol=1e-6, atol=4e-6)
    torch.testing.assert_close(lazy.state_dict(), source.state_dict(), rtol=1e-6, atol=1e-6)
    assert type(lazy) is bn.BatchNorm2d
    assert lazy.num_features == 3


def test_other_channels_than_the_loaded_state_has_are_an_input_error():
    lazy = bn.LazyBatchNorm2d()
    lazy.load_state_dict(nn.BatchNorm2d(3).state_dict())
    with pytest.raises(bn.InputError, match="num_features=3 channels in dimension 1; got 5"):
        lazy(torch.randn(4, 5, 2, 2))


@pytest.mark.parametrize(
    ("lazy", "shape"),
    [
        (bn.LazyBatchNorm1d, (4, 3, 2, 2)),
        (bn.LazyBatchNorm2d, (4, 3, 2)),
        (bn.LazyBatchNorm3d, (4, 3, 2, 2)),
        (bn.LazyBatchNorm, (4,)),
    ],
)
def test_wrong_dimensions_raise_and_leave_it_uninitialised(lazy, shape):
    layer = lazy()
    with pytest.raises(ValueError, match=r"expected .*D|at least 2 dim"):
        layer(torch.randn(shape))
    assert uninitialised(layer)
    assert type(layer) is lazy


def test_a_channel_dim_that_is_not_there_raises_and_leaves_it_uninitialised():
    layer = bn.LazyBatchNorm(channel_dim=3)
    with pytest.raises(bn.InputError, match="channel_dim=3 must be a dimension"):
        layer(torch.randn(4, 3))
    assert uninitialised(layer)


def test_an_option_out_of_range_raises_when_built():
    with pytest.raises(bn.InputError, match="got 'swish'"):
        bn.LazyBatchNorm1d(activation="swish")
    with pytest.raises(bn.InputError, match="got -1"):
        bn.LazyBatchNorm1d(eps=-1)


def test_an_unknown_option_is_a_type_error():
    with pytest.raises(TypeError, match="swish"):
        bn.LazyBatchNorm1d(swish=1)


def test_an_eval_batch_initialises_it_and_moves_nothing():
    layer = bn.LazyBatchNorm1d().eval()
    layer(torch.randn(4, 3))
    assert_same_states(layer.state_dict(), nn.BatchNorm1d(3).state_dict())


def test_the_first_batch_may_come_with_residual_and_mask():
    x, residual, mask = torch.randn(4, 3), torch.randn(4, 3), torch.tensor([True, True, False, True])
    assert torch.equal(bn.LazyBatchNorm1d()(x, residual=residual, mask=mask), bn.BatchNorm1d(3)(x, residual, mask))
    assert torch.equal(bn.LazyBatchNorm1d()(x, residual, mask), bn.BatchNorm1d(3)(x, residual, mask))


def test_the_first_batch_counts():
    layer = bn.LazyBatchNorm1d()
    layer(torch.tensor([[1.0], [3.0]]))
    assert int(layer.num_batches_tracked) == 1
    torch.testing.assert_close(layer.running_mean, torch.tensor([0.2]))


def test_it_trains_within_a_model_after_a_dry_run():
    model = nn.Sequential(nn.LazyLinear(3), bn.LazyBatchNorm1d(activation="relu"), nn.LazyLinear(1))
    model(torch.randn(4, 5))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(torch.randn(4, 5)).square().sum().backward()
    before = model[1].bias.detach().clone()
    optimizer.step()
    assert not torch.equal(model[1].bias, before)


def test_a_pickled_one_is_as_lazy_and_keeps_its_options():
    layer = pickle.loads(pickle.dumps(bn.LazyBatchNorm1d(activation="relu")))
    assert uninitialised(layer)
    layer(torch.randn(4, 3))
    assert repr(layer) == repr(bn.BatchNorm1d(3, activation="relu"))


def test_it_learns_its_channels_on_the_meta_device():
    layer = bn.LazyBatchNorm2d(device="meta")
    layer(torch.randn(4, 3, 2, 2, device="meta"))
    assert type(layer) is bn.BatchNorm2d
    assert all(tensor.is_meta and tensor.shape in ((3,), ()) for tensor in [*layer.parameters(), *layer.buffers()])
