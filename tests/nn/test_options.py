"""Options and inputs of a layer: clear errors for wrong ones, and the repr."""

import numpy as np
import pytest
import torch
from torch import nn

import batchnorm as bn
from batchnorm.kernels.chosen import cpu_kernel
from support import PassThroughMode

REFUSED = {
    "small_batch": ({"small_batch": "skip"}, r"small_batch must be 'raise' or 'running'; got 'skip'"),
    "small_batch=None": ({"small_batch": None}, r"small_batch must be 'raise' or 'running'; got None"),
    "nonfinite": ({"nonfinite": "ignore"}, r"nonfinite must be 'skip' or 'propagate'; got 'ignore'"),
    "unbiased": ({"unbiased": "biased"}, r"unbiased must be True or False; got 'biased'"),
    "activation": ({"activation": "swish"}, r"relu, leaky_relu, silu, gelu, tanh, sigmoid; got 'swish'"),
    "activation=list": ({"activation": ["relu"]}, r"one of relu, .*; got \['relu'\]"),
    "small_batch=list": ({"small_batch": ["raise"]}, r"small_batch must be 'raise' or 'running'; got \['raise'\]"),
    "momentum=inf": ({"momentum": float("inf")}, r"momentum must be None or a number from 0 .*; got inf"),
    "momentum=-0.1": ({"momentum": -0.1}, r"momentum must be None or a number from 0 .*; got -0\.1"),
    "momentum=nan": ({"momentum": float("nan")}, r"momentum must be .*; got nan"),
    "momentum='0.1'": ({"momentum": "0.1"}, r"momentum must be .*; got '0\.1'"),
    "momentum=True": ({"momentum": True}, r"momentum must be .*; got True"),
    "eps=-1e-5": ({"eps": -1e-5}, r"eps must be finite and at least 0; got -1e-05"),
    "eps=nan": ({"eps": float("nan")}, r"eps must be finite and at least 0; got nan"),
    "eps=inf": ({"eps": float("inf")}, r"eps must be .*; got inf"),
    "eps=None": ({"eps": None}, r"eps must be finite and at least 0; got None"),
    "virtual_batch_size=0": ({"virtual_batch_size": 0}, r"virtual_batch_size must be None or .* from 2; got 0"),
    "virtual_batch_size=1": ({"virtual_batch_size": 1}, r"virtual_batch_size must be None or .* from 2; got 1$"),
    "virtual_batch_size=1.5": ({"virtual_batch_size": 1.5}, r"virtual_batch_size must be .*; got 1\.5"),
    "virtual_batch_size=4.0": ({"virtual_batch_size": 4.0}, r"virtual_batch_size must be .*; got 4\.0"),
    "virtual_batch_size=True": ({"virtual_batch_size": True}, r"virtual_batch_size must be .*; got True"),
    "renorm=tuple": ({"renorm": (3.0, 5.0)}, r"renorm must be .*Renorm.*; got \(3\.0, 5\.0\)"),
    "renorm=True": ({"renorm": True}, r"renorm must be None, .*Renorm or .*RenormSchedule; got True"),
    "channel_dim=1.0": ({"channel_dim": 1.0}, r"channel_dim must be a whole number; got 1\.0"),
    "renorm without statistics": (
        {"renorm": bn.Renorm(3.0, 5.0), "track_running_stats": False},
        r"renorm uses the running statistics.*track_running_stats=False",
    ),
    "running without statistics": (
        {"small_batch": "running", "track_running_stats": False},
        r"small_batch='running' uses the running statistics.*track_running_stats=False",
    ),
}


@pytest.mark.parametrize(("options", "words"), REFUSED.values(), ids=REFUSED)
@pytest.mark.parametrize("build", [lambda **given: bn.BatchNorm1d(3, **given), bn.LazyBatchNorm1d], ids=["", "lazy"])
def test_what_is_out_of_range_is_refused_with_the_rule_and_the_value(build, options, words):
    with pytest.raises(bn.InputError, match=words):
        build(**options)


@pytest.mark.parametrize("momentum", [0.9, 0.99, 1.0])
@pytest.mark.parametrize("layer", [bn.BatchNorm, bn.BatchNorm1d, bn.BatchNorm2d, bn.BatchNorm3d])
def test_a_momentum_from_0_9_warns_of_keras_and_says_what_it_is_here(layer, momentum):
    with pytest.warns(UserWarning, match=f"momentum={momentum} .*Keras.*momentum={1 - momentum:.4g} here") as said:
        layer(3, momentum=momentum)
    assert len(said) == 1
    assert said[0].filename == __file__


def test_a_lazy_layer_warns_of_keras_once():
    with pytest.warns(UserWarning, match="Keras") as said:
        bn.LazyBatchNorm1d(momentum=0.99)(torch.randn(4, 3))
    assert len(said) == 1
    assert said[0].filename == __file__


@pytest.mark.parametrize("momentum", [0, 0.0, 0.1, 0.89, None])
def test_other_momenta_do_not_warn(momentum):
    assert bn.BatchNorm1d(3, momentum=momentum).momentum == momentum


# Kernels.

NATIVE = {
    "plain": {},
    "activation": {"activation": "leaky_relu"},
    "virtual batches": {"virtual_batch_size": 3},
    "renorm": {"renorm": bn.Renorm(2.0, 1.0)},
    "a schedule": {"renorm": bn.RenormSchedule(start=0)},
    "all": {"virtual_batch_size": 3, "renorm": bn.Renorm(2.0, 1.0), "activation": "relu", "momentum": None},
}


@pytest.mark.parametrize("masked", [False, True], ids=["", "mask"])
@pytest.mark.parametrize("channel_dim", [1, -1])
@pytest.mark.parametrize("options", NATIVE.values(), ids=NATIVE)
def test_options_and_masks_run_on_the_native_kernels_directly(options, channel_dim, masked):
    assert cpu_kernel() == "native"
    layer, x = bn.BatchNorm1d(4, channel_dim=channel_dim, **options), torch.randn(8, 4, 4)
    mask = torch.arange(4) < torch.arange(8).unsqueeze(1) if masked else None
    with bn.accumulate(layer):
        y = layer(x, x, mask)  # torch 2.10 names nodes only while their output lives
    node = y.grad_fn
    while node is not None and node.name() != "BatchNormBackward":  # the last may be a view
        assert node.name() == "ViewBackward0"
        node = node.next_functions[0][0]
    assert node is not None


# Numbers of NumPy.


def test_numbers_of_numpy_are_taken_as_those_of_python():
    given = {"eps": np.float32(0.5), "momentum": np.float64(0.25), "virtual_batch_size": np.int64(4)}
    layer = bn.BatchNorm(np.int64(3), channel_dim=np.int32(-1), renorm=bn.Renorm(np.float32(3), np.int64(5)), **given)
    plain = bn.BatchNorm(3, 0.5, 0.25, virtual_batch_size=4, channel_dim=-1, renorm=bn.Renorm(3.0, 5.0))
    assert repr(layer) == repr(plain)
    assert {type(v) for v in (layer.eps, layer.momentum, layer.renorm.r_max, layer.renorm.d_max)} == {float}
    assert {type(v) for v in (layer.num_features, layer.virtual_batch_size, layer.channel_dim)} == {int}


@pytest.mark.parametrize("given", [-1, 3.0, "3", None, True], ids=repr)
def test_a_number_of_features_that_is_none_is_refused(given):
    with pytest.raises(bn.InputError, match=rf"num_features must be a whole number from 0; got {given!r}"):
        bn.BatchNorm1d(given)


# Options set later.


# eps and momentum are torch's, whose own tools set them.
LATER = {name: refused for name, refused in REFUSED.items() if not {"eps", "momentum"} & refused[0].keys()}


@pytest.mark.parametrize(("options", "words"), LATER.values(), ids=LATER)
def test_an_option_out_of_range_is_refused_when_it_is_set_later(options, words):
    layer = bn.BatchNorm1d(3, track_running_stats=options.get("track_running_stats", True))
    (name, value), *_ = options.items()
    before = repr(layer)
    with pytest.raises(bn.InputError, match=words):
        setattr(layer, name, value)
    assert repr(layer) == before


def test_options_that_make_no_sense_together_are_refused_when_one_is_set_later():
    with pytest.raises(bn.InputError, match="exclude each other"):
        bn.BatchNorm1d(3, sync=True).virtual_batch_size = 4


def test_what_becomes_of_batches_that_are_not_finite_may_be_set_later():
    layer, x = bn.BatchNorm1d(3, nonfinite="propagate"), torch.full((4, 3), torch.inf)
    layer.nonfinite = "skip"
    layer(x)
    assert (int(layer.skipped_batches), int(layer.num_batches_tracked)) == (1, 0)
    layer.nonfinite = "propagate"
    layer(x)
    assert layer.skipped_batches is None
    assert not layer.running_mean.isfinite().any()


# Inputs of forward.


@pytest.mark.parametrize("channel_dim", [1, 0, -1])
def test_a_residual_or_mask_that_is_no_tensor_is_refused_by_its_type(channel_dim):
    layer, x = bn.BatchNorm1d(3, channel_dim=channel_dim), torch.randn(3, 3)
    with pytest.raises(bn.InputTypeError, match="residual must be a tensor; got float"):
        layer(x, 3.0)
    with pytest.raises(bn.InputTypeError, match="mask must be a tensor; got str"):
        layer(x, mask="x")


def test_a_wrong_number_of_features_is_refused_with_the_modules_path():
    model = torch.nn.Sequential(torch.nn.Identity(), bn.BatchNorm1d(3))
    with pytest.raises(bn.InputError, match=r"^1: input must have num_features=3"):
        model(torch.randn(2, 4))


def test_a_wrong_number_of_features_is_refused_by_both_numbers_and_the_shape():
    with pytest.raises(bn.InputError, match=r"num_features=3 .* dimension 1; got 4, in shape \(2, 4\)"):
        bn.BatchNorm1d(3)(torch.randn(2, 4))


@pytest.mark.parametrize("training", [True, False])
def test_channels_last_given_to_a_1d_layer_names_the_axes_and_the_way_out(training):
    with pytest.raises(bn.InputError, match=r"got 7, in shape \(4, 7, 3\)\. For \(N, L, C\), .* channel_dim=-1"):
        bn.BatchNorm1d(3).train(training)(torch.randn(4, 7, 3))


@pytest.mark.parametrize(
    ("shape", "way"), [((4, 7, 7, 3), "channel_dim=-1"), ((4, 7, 3, 7), "channel_dim=2"), ((3, 7, 7, 4), None)], ids=str
)
def test_channels_that_stand_elsewhere_are_pointed_at(shape, way):
    layer = bn.BatchNorm2d(3) if way else bn.BatchNorm2d(5)
    with pytest.raises(bn.InputError, match=way or r"got 7, in shape \(3, 7, 7, 4\)$"):
        layer(torch.randn(shape))


def test_the_way_out_that_is_named_works():
    assert bn.BatchNorm1d(3, channel_dim=-1)(torch.randn(4, 7, 3)).shape == (4, 7, 3)
    assert bn.BatchNorm2d(3, channel_dim=2)(torch.randn(4, 7, 3, 7)).shape == (4, 7, 3, 7)


@pytest.mark.parametrize(("channel_dim", "shape"), [(2, (4, 3)), (-3, (4, 3)), (5, (4, 3, 2, 2))])
def test_a_channel_dim_that_the_input_has_not_is_refused(channel_dim, shape):
    with pytest.raises(bn.InputError, match=rf"channel_dim={channel_dim} must be a dimension of the input; got shape"):
        bn.BatchNorm(3, channel_dim=channel_dim)(torch.randn(shape))


@pytest.mark.parametrize("channel_dim", [1, 2, 0, -1])
@pytest.mark.parametrize("shape", [(3, 3), (3, 3, 4), (1, 3, 3), (9, 3)], ids=str)
def test_a_residual_of_another_shape_is_refused(shape, channel_dim):
    with pytest.raises(bn.InputError, match=r"residual must have the input's shape \(3, 3, 3\); got \("):
        bn.BatchNorm1d(3, channel_dim=channel_dim)(torch.randn(3, 3, 3), torch.randn(shape))


@pytest.mark.parametrize("channel_dim", [1, -1])
@pytest.mark.parametrize(
    "mask",
    [torch.ones(4), torch.ones(4, 3, dtype=torch.bool), torch.ones(4, 7), torch.ones(4, 7, dtype=torch.int64)],
    ids=["one dimension", "shape", "float", "int64"],
)
def test_a_mask_of_another_shape_or_dtype_is_refused(mask, channel_dim):
    x = torch.randn(4, 5, 7) if channel_dim == 1 else torch.randn(4, 7, 5)
    with pytest.raises(bn.InputError, match=r"mask must be bool and of shape \(4, 7\), where each .*; got torch\."):
        bn.BatchNorm1d(5, channel_dim=channel_dim)(x, mask=mask)


@pytest.mark.parametrize("given", [np.ones((4, 3), dtype=np.float32), [[1.0, 2.0, 3.0]], None, 3], ids=repr)
def test_input_that_is_no_tensor_is_refused_by_its_type(given):
    with pytest.raises(bn.InputTypeError, match=f"input must be a tensor; got {type(given).__name__}"):
        bn.BatchNorm1d(3)(given)


@pytest.mark.parametrize(("layer", "shape"), [(bn.BatchNorm1d, (2, 3, 4, 4)), (bn.BatchNorm2d, (2, 3, 4))], ids=str)
def test_a_wrong_number_of_dimensions_is_refused_as_torch_does(layer, shape):
    with pytest.raises(ValueError, match=rf"expected .*D.* \(got {len(shape)}D input\)"):
        layer(3)(torch.randn(shape))


# The repr.

SHOWN = {
    "activation='gelu'": {"activation": "gelu"},
    "small_batch='running'": {"small_batch": "running"},
    "nonfinite='propagate'": {"nonfinite": "propagate"},
    "virtual_batch_size=4": {"virtual_batch_size": 4},
    "renorm=Renorm(r_max=3.0, d_max=5.0)": {"renorm": bn.Renorm(3.0, 5.0)},
    "channel_dim=-1": {"channel_dim": -1},
    "unbiased=False": {"unbiased": False},
    "eps=0.001": {"eps": 1e-3},
    "momentum=None": {"momentum": None},
    "affine=False": {"affine": False},
    "track_running_stats=False": {"track_running_stats": False},
}


@pytest.mark.parametrize(("words", "options"), SHOWN.items(), ids=SHOWN)
def test_the_repr_shows_what_is_no_default_and_only_that(words, options):
    shown = repr(bn.BatchNorm1d(3, **options))
    assert words in shown
    assert words not in repr(bn.BatchNorm1d(3))
    assert shown.count("=") == repr(torch.nn.BatchNorm1d(3)).count("=") + ("r_max" in words) * 2 + (
        not set(options) & {"eps", "momentum", "affine", "track_running_stats"}
    )


# The running variance.


@pytest.mark.parametrize("direct", [True, False], ids=["native", "dispatched"])
@pytest.mark.parametrize("options", [{}, {"virtual_batch_size": 3}, {"renorm": bn.Renorm(3.0, 5.0)}], ids=str)
@pytest.mark.parametrize("unbiased", [False, True])
@pytest.mark.parametrize("shape", [(7, 3), (4, 3, 5), (4, 3, 5, 2)], ids=str)
def test_the_running_variance_is_unbiased_or_biased_as_the_option_says(shape, unbiased, options, direct):
    assert cpu_kernel() == "native"
    layer = bn.BatchNorm(3, unbiased=unbiased, momentum=0.25, **options)
    x = 2 * torch.randn(shape, generator=torch.Generator().manual_seed(0)) + 1
    if direct:
        layer(x)
    else:
        with PassThroughMode():
            layer(x)
    axes = tuple(d for d in range(x.dim()) if d != 1)
    expected = 0.75 + 0.25 * x.double().numpy().var(axis=axes, ddof=int(unbiased))
    # Kept in float32: a few roundings of 6e-8, relative.
    np.testing.assert_allclose(layer.running_var.numpy(), expected, rtol=3e-7)


# Numbers that torch takes.


def test_a_momentum_above_one_is_taken_with_a_warning_and_gives_torchs_statistics():
    with pytest.warns(UserWarning, match=r"momentum=1.5 weighs the old running statistics by -0.5"):
        layers = [bn.BatchNorm1d(3, momentum=1.5), nn.BatchNorm1d(3, momentum=1.5)]
    for seed in range(3):
        for layer in layers:
            layer(torch.randn(8, 3, generator=torch.Generator().manual_seed(seed)))
    ours, theirs = (dict(layer.named_buffers()) for layer in layers)
    for name in ("running_mean", "running_var"):
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-5, atol=1e-5)


def test_an_eps_of_zero_gives_torchs_output_in_eval_a_constant_channel_included():
    x, layers = torch.randn(8, 3), [of.BatchNorm1d(3, eps=0.0).eval() for of in (bn, nn)]
    x[:, 0] = 5
    for layer in layers:
        layer.running_mean[0], layer.running_var[0] = 5, 0
    ours, theirs = (layer(x) for layer in layers)
    assert ours[:, 0].isnan().all()
    torch.testing.assert_close(ours, theirs, equal_nan=True)


@pytest.mark.parametrize("layer", [bn.BatchNorm1d(3, eps=0), bn.BatchNorm1d(3, 0, track_running_stats=False).eval()])
def test_an_eps_of_zero_is_refused_where_the_batchs_statistics_are_used(layer):
    with pytest.raises(bn.InputError, match=r"eps must be positive where a batch's own statistics .*; got 0\. With"):
        layer(torch.randn(8, 3))


def test_an_eps_of_zero_trains_frozen():
    layer = bn.freeze(bn.BatchNorm1d(3, eps=0))
    assert torch.equal(layer(torch.eye(3)), torch.eye(3))
