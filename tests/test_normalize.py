"""normalize() and the layers under the transforms of torch.func."""

import warnings

import pytest
import torch
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jvp, stack_module_state, vmap

import batchnorm as bn
from batchnorm.ops import running
from support import assert_same_buffers, copied_buffers, randn

C = 5
# Sums of 60 float32 products of size 10 in another order: 60 x 10 x 2**-24 = 4e-5.
CLOSE = {"rtol": 1e-5, "atol": 4e-5}
# torch's own jvp uses functions that torch deprecates.
uses_jvp = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@pytest.fixture(autouse=True)
def not_yet_warned():
    """Let the warning about captured statistics, which is given once per process, be given again."""
    running._warn_of_captured.cache_clear()


def fresh_stats(**options):
    return bn.Stats(torch.zeros(C, **options), torch.ones(C, **options), torch.tensor(0))


def stats_of(layer):
    return bn.Stats(layer.running_mean, layer.running_var, layer.num_batches_tracked)


def assert_stats_close(ours, theirs):
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine.double(), other.double(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("momentum", [0.3, None])
def test_over_several_steps_it_equals_torchs_layer_in_float64(momentum):
    layer, stats = torch.nn.BatchNorm1d(C, momentum=momentum).double(), fresh_stats()
    with torch.no_grad():
        layer.weight.copy_(randn(C, seed=1))
        layer.bias.copy_(randn(C, seed=2))
    weight, bias = layer.weight.float(), layer.bias.float()
    for seed in range(5):
        x = randn(6, C, 4, seed=seed) + seed
        y, stats = bn.normalize(x, stats, weight, bias, momentum=momentum)
        torch.testing.assert_close(y.double(), layer(x.double()), **CLOSE)
        assert_stats_close(stats, stats_of(layer))
    y, _ = bn.normalize(x, stats, weight, bias, training=False)
    torch.testing.assert_close(y.double(), layer.eval()(x.double()), **CLOSE)


@pytest.mark.parametrize("momentum", [0.3, None])
def test_over_several_steps_it_equals_the_layer(momentum):
    layer, stats = bn.BatchNorm1d(C, momentum=momentum, activation="relu"), fresh_stats()
    for seed in range(5):
        x, residual = randn(6, C, 4, seed=seed) + seed, randn(6, C, 4, seed=seed + 10)
        mask = torch.arange(4) < torch.tensor([4, 1, 2, 3, 4, 0]).unsqueeze(1)
        y, stats = bn.normalize(x, stats, momentum=momentum, activation="relu", residual=residual, mask=mask)
        torch.testing.assert_close(y, layer(x, residual, mask), **CLOSE)
        assert_stats_close(stats, stats_of(layer))


@pytest.mark.parametrize("training", [True, False])
def test_the_arguments_stay_unchanged(training):
    arguments = [randn(6, C, 4), *fresh_stats(), randn(C, seed=1), randn(C, seed=2), randn(6, C, 4, seed=3)]
    before = [values.clone() for values in arguments]
    x, mean, var, count, weight, bias, residual = arguments
    bn.normalize(x, bn.Stats(mean, var, count), weight, bias, training=training, residual=residual, activation="relu")
    assert all(torch.equal(values, old) for values, old in zip(arguments, before, strict=True))
    assert all(values._version == 0 for values in arguments)


def test_eval_returns_the_stats_it_was_given():
    stats = fresh_stats()
    _, after = bn.normalize(randn(6, C), stats, training=False)
    assert all(mine is given for mine, given in zip(after, stats, strict=True))


def test_the_new_stats_take_no_part_in_gradients():
    x, stats = randn(6, C).requires_grad_(), bn.Stats(randn(C).requires_grad_(), torch.ones(C), torch.tensor(0))
    y, after = bn.normalize(x, stats)
    assert y.requires_grad
    assert not any(values.requires_grad for values in after)


@pytest.mark.parametrize("dim", [-1, 2, 0])
def test_the_channels_may_be_any_dimension(dim):
    x, residual, mask = randn(6, C, 4), randn(6, C, 4, seed=1), randn(6, 4, seed=2) > 0
    expected = bn.normalize(x, fresh_stats(), residual=residual, mask=mask, activation="relu")
    permuted = bn.normalize(
        x.movedim(1, dim),
        fresh_stats(),
        residual=residual.movedim(1, dim),
        mask=mask,
        activation="relu",
        channel_dim=dim,
    )
    torch.testing.assert_close(permuted[0].movedim(dim, 1), expected[0], **CLOSE)
    assert_stats_close(permuted[1], expected[1])


def test_a_masked_batch_equals_the_batch_of_its_values_that_count():
    x, residual, mask = randn(6, C, 4), randn(6, C, 4, seed=1), randn(6, 4, seed=2) > 0
    hole = mask.unsqueeze(1)
    y, stats = bn.normalize(
        torch.where(hole, x, torch.nan), fresh_stats(), residual=torch.where(hole, residual, torch.nan), mask=mask
    )
    layer = torch.nn.BatchNorm1d(C).double()
    rows = [values.movedim(1, -1)[mask].double() for values in (x, residual)]
    torch.testing.assert_close(y.movedim(1, -1)[mask].double(), layer(rows[0]) + rows[1], **CLOSE)
    assert not y.movedim(1, -1)[~mask].any()
    assert_stats_close(stats, stats_of(layer))


@pytest.mark.parametrize("dim", [3, -4])
def test_a_dimension_that_the_input_lacks_is_refused(dim):
    with pytest.raises(bn.InputError, match=rf"channel_dim={dim} must be a dimension .*\(6, 5, 4\)"):
        bn.normalize(randn(6, C, 4), fresh_stats(), channel_dim=dim)


@pytest.mark.parametrize(("name", "value"), [("momentum", -0.1), ("eps", -1), ("residual", 3.0), ("mask", "x")])
def test_a_bad_argument_is_refused_by_name_and_value(name, value):
    with pytest.raises((bn.InputError, bn.InputTypeError), match=rf"^{name} must be .*got ({value}|float|str)$"):
        bn.normalize(randn(6, C), fresh_stats(), **{name: value})


def test_stats_of_other_channels_are_refused():
    with pytest.raises(bn.InputError, match="mean must have one number for each of the input's 4 channels"):
        bn.normalize(randn(6, 4), fresh_stats())


# Transforms.

OPTIONS = {
    "plain": {},
    "relu": {"activation": "relu"},
    "gelu, cumulative": {"activation": "gelu", "momentum": None},
    "eval": {"training": False, "activation": "silu"},
    "mask": {"mask": randn(6, 4, seed=8) > 0, "activation": "leaky_relu"},
    "residual": {"residual": randn(6, C, 4, seed=9), "activation": "relu"},
}
every_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)


def loss(x, weight, bias, stats, options):
    y, after = bn.normalize(x, stats, weight, bias, **options)
    slopes = torch.arange(y.numel(), dtype=y.dtype).view(y.shape).sin()
    return y.square().sum() + (y * slopes).sum(), after


def leaves(dtype=torch.float32):
    return randn(6, C, 4, dtype=dtype), randn(C, seed=1, dtype=dtype), randn(C, seed=2, dtype=dtype)


@every_option
def test_grad_gives_the_gradients_of_backward_and_the_new_stats(options):
    found, after = grad(loss, argnums=(0, 1, 2), has_aux=True)(*leaves(), fresh_stats(), options)
    ours = [values.requires_grad_() for values in leaves()]
    value, expected = loss(*ours, fresh_stats(), options)
    for mine, theirs in zip(found, torch.autograd.grad(value, ours), strict=True):
        torch.testing.assert_close(mine, theirs, **CLOSE)
    assert_stats_close(after, expected)


@uses_jvp
@every_option
def test_jvp_equals_the_difference_quotient_and_updates_the_stats(options):
    options = {name: v.double() if name == "residual" else v for name, v in options.items()}
    x, weight, bias = leaves(torch.float64)
    tangents = randn(6, C, 4, seed=6, dtype=torch.float64), *(randn(C, seed=s, dtype=torch.float64) for s in (7, 8))

    def along(h):
        shifted = [values + h * tangent for values, tangent in zip((x, weight, bias), tangents, strict=True)]
        return bn.normalize(shifted[0], fresh_stats(), *shifted[1:], **options)

    (y, after), (tangent, *_) = jvp(
        lambda *args: bn.normalize(args[0], fresh_stats(), *args[1:], **options), (x, weight, bias), tangents
    )
    h = 1e-6  # a central difference is off by h^2 of the third derivative, and by 1e-16 / h
    expected, stats = along(0)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(tangent, (along(h)[0] - along(-h)[0]) / (2 * h), rtol=1e-6, atol=1e-7)
    assert_stats_close(after, stats)


@every_option
def test_vmap_over_batches_and_stats_equals_a_loop(options):
    x = randn(3, 6, C, 4)
    stats = bn.Stats(randn(3, C, seed=1), randn(3, C, seed=2).exp(), torch.tensor([0, 4, 7]))
    weight = randn(3, C, seed=3)
    y, after = vmap(lambda x, stats, weight: bn.normalize(x, stats, weight, **options))(x, stats, weight)
    for i in range(3):
        alone, updated = bn.normalize(x[i], bn.Stats(*(values[i] for values in stats)), weight[i], **options)
        torch.testing.assert_close(y[i], alone, **CLOSE)
        assert_stats_close([values[i] for values in after], updated)


def test_stats_that_are_not_mapped_are_returned_for_each_batch():
    x = randn(3, 6, C, 4)
    _, after = vmap(lambda x: bn.normalize(x, fresh_stats()))(x)
    for i in range(3):
        assert_stats_close([values[i] for values in after[:2]], bn.normalize(x[i], fresh_stats())[1][:2])


@pytest.mark.parametrize("training", [True, False])
def test_gradients_per_sample_equal_a_loop(training):
    samples, weight, bias = randn(4, 2, C, 3), *leaves()[1:]
    stats, options = fresh_stats(), {"training": training, "activation": "relu"}
    found = vmap(grad(lambda x, w, b: loss(x, w, b, stats, options)[0], argnums=(0, 1, 2)), in_dims=(0, None, None))(
        samples, weight, bias
    )
    for i, x in enumerate(samples):
        ours = [values.clone().requires_grad_() for values in (x, weight, bias)]
        expected = torch.autograd.grad(loss(*ours, stats, options)[0], ours)
        for mine, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(mine[i], theirs, **CLOSE)


class Pure(torch.nn.Module):
    """A network around normalize that takes and returns statistics."""

    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(3, C)
        self.weight = torch.nn.Parameter(randn(C, seed=3))

    def forward(self, x, stats):
        return bn.normalize(self.linear(x), stats, self.weight, activation="relu")


def test_functional_call_of_a_network_around_it_has_the_networks_gradients():
    network, x = Pure(), randn(6, 3)

    def of_parameters(parameters, stats):
        y, stats = functional_call(network, parameters, (x, stats))
        return y.square().sum(), stats

    found, after = grad(of_parameters, has_aux=True)(dict(network.named_parameters()), fresh_stats())
    y, expected = network(x, fresh_stats())
    y.square().sum().backward()
    for name, parameter in network.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, **CLOSE)
    assert_stats_close(after, expected)


# Layers.


def network(seed, **options):
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(3, C), bn.BatchNorm1d(C, **options), torch.nn.Linear(C, 2))
    torch.nn.init.normal_(model[1].weight)
    return model


def assert_buffers_equal(stacked, models):
    for i, model in enumerate(models):
        for name, values in model.named_buffers():
            torch.testing.assert_close(stacked[name][i], values, rtol=1e-5, atol=1e-6)


ENSEMBLES = {
    "defaults": {},
    "cumulative": {"momentum": None, "activation": "relu"},
    "propagate, biased": {"nonfinite": "propagate", "unbiased": False},
    "virtual batches": {"virtual_batch_size": 3},
    "renorm": {"renorm": bn.Renorm(1.5, 0.5)},
    "scheduled renorm": {"renorm": bn.RenormSchedule(start=0, r_end=3, d_end=2), "virtual_batch_size": 4},
}


@pytest.mark.parametrize("options", ENSEMBLES.values(), ids=ENSEMBLES)
def test_a_stacked_ensemble_trains_as_its_models_one_by_one(options):
    models = [network(seed, **options) for seed in range(3)]
    base, alone = network(9, **options), [network(seed, **options) for seed in range(3)]
    parameters, buffers = stack_module_state(models)
    for step in range(3):
        x, target = randn(8, 3, seed=step), randn(8, 2, seed=step + 10)

        def loss(parameters, buffers, x=x, target=target):
            return (functional_call(base, (parameters, buffers), (x,)) - target).square().sum()

        gradients = vmap(grad(loss))(parameters, buffers)
        for i, model in enumerate(alone):
            model.zero_grad()
            (model(x) - target).square().sum().backward()
            for name, parameter in model.named_parameters():
                torch.testing.assert_close(gradients[name][i], parameter.grad, rtol=1e-4, atol=1e-4)
        assert_buffers_equal(buffers, alone)
        assert int(alone[0][1].num_batches_tracked) == step + 1


def test_an_ensemble_may_see_a_batch_each_and_only_the_poisoned_one_skips_it():
    models, alone = ([network(seed) for seed in range(3)] for _ in range(2))
    parameters, buffers = stack_module_state(models)
    x = randn(3, 8, 3)
    x[1, 2, 0] = torch.inf
    y = vmap(lambda p, b, x: functional_call(models[0], (p, b), (x,)))(parameters, buffers, x)
    for i, model in enumerate(alone):
        torch.testing.assert_close(y[i], model(x[i]), equal_nan=True, **CLOSE)
    assert buffers["1.skipped_batches"].tolist() == [0, 1, 0]
    assert buffers["1.num_batches_tracked"].tolist() == [1, 0, 1]
    assert_buffers_equal(buffers, alone)


def test_an_ensemble_in_eval_uses_the_buffers_of_each_and_updates_none():
    models = [network(seed).eval() for seed in range(3)]
    for seed, model in enumerate(models):
        model[1].running_mean.copy_(randn(C, seed=seed))
    parameters, buffers = stack_module_state(models)
    before, x = {name: values.clone() for name, values in buffers.items()}, randn(8, 3)
    y = vmap(lambda p, b: functional_call(models[0], (p, b), (x,)))(parameters, buffers)
    for i, model in enumerate(models):
        torch.testing.assert_close(y[i], model(x), **CLOSE)
    assert all(torch.equal(values, before[name]) for name, values in buffers.items())


@pytest.mark.parametrize("transform", ["none", "grad"])
def test_functional_call_updates_the_buffers_passed_in(transform):
    layer, alone, x = bn.BatchNorm1d(C), bn.BatchNorm1d(C), randn(6, C)
    before, buffers = copied_buffers(layer), copied_buffers(layer)

    def run(x, buffers):
        return functional_call(layer, buffers, (x,)).square().sum()

    (grad(run) if transform == "grad" else run)(x, buffers)
    alone(x)
    assert_stats_close(buffers.values(), copied_buffers(alone).values())
    assert_same_buffers(layer, before)


def under_grad(layer, x, v):
    return grad(lambda x: (layer(x) * v).sum())(x)


def under_jvp(layer, x, v):
    return jvp(layer, (x,), (v,))[1]


def under_dual_level(layer, x, v):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(layer(forward_ad.make_dual(x, v))).tangent


CAPTURING = {"grad": under_grad, "jvp": under_jvp, "dual level": under_dual_level}
capturing = pytest.mark.parametrize("transform", CAPTURING.values(), ids=CAPTURING)


@uses_jvp
@capturing
@pytest.mark.parametrize("options", [{}, {"virtual_batch_size": 3}, {"renorm": bn.Renorm(2.0, 1.0)}], ids=str)
def test_captured_statistics_are_left_alone_with_one_warning(transform, options):
    layer, x, v = bn.BatchNorm1d(C, **options), randn(6, C), randn(6, C, seed=1)
    before = copied_buffers(layer)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        warnings.simplefilter("ignore", DeprecationWarning)
        transform(layer, x, v)
        transform(layer, x, v)
    assert len(caught) == 1
    assert "batchnorm.normalize" in str(caught[0].message)
    assert caught[0].filename == __file__
    assert_same_buffers(layer, before)


def test_captured_buffers_of_functional_call_are_left_alone_with_a_warning():
    layer, x = bn.BatchNorm1d(C), randn(6, C)
    parameters, buffers = dict(layer.named_parameters()), copied_buffers(layer)
    before = copied_buffers(layer)

    def run(parameters, buffers):
        return functional_call(layer, (parameters, buffers), (x,)).square().sum()

    with pytest.warns(UserWarning, match="no argument of the transformed function"):
        grad(lambda parameters: run(parameters, buffers))(parameters)
    assert all(torch.equal(values, before[name]) for name, values in buffers.items())
    grad(run)(parameters, buffers)
    assert buffers["num_batches_tracked"] == 1


@uses_jvp
@pytest.mark.filterwarnings("ignore:under torch.func.grad:UserWarning")
@capturing
def test_a_transform_leaves_the_pool_of_an_accumulation_alone(transform):
    layer, x, v = bn.BatchNorm1d(C), randn(6, C), randn(6, C, seed=1)
    before = copied_buffers(layer)
    with bn.accumulate(layer):
        transform(layer, x, v)
    assert_same_buffers(layer, before)


def test_under_vmap_an_accumulation_is_refused_and_keeps_its_pool():
    layer, x = bn.BatchNorm1d(C), randn(4, 6, C)
    with bn.accumulate(layer):
        layer(x[0])
        with pytest.raises(bn.InputError, match=r"vmap.*batchnorm\.normalize"):
            vmap(layer)(x)
    torch.testing.assert_close(layer.running_mean, 0.1 * x[0].mean(0), rtol=1e-5, atol=1e-6)


@uses_jvp
@pytest.mark.filterwarnings("ignore:under torch.func.grad:UserWarning")
@capturing
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("activation", [None, "gelu"])
def test_derivatives_through_a_layer_are_those_of_torchs_formula(transform, activation, training):
    layer = bn.BatchNorm1d(C, activation=activation).double().train(training)
    x, v = (randn(6, C, seed=seed, dtype=torch.float64) for seed in (0, 1))

    def formula(x):
        mean, var = (x.mean(0), x.var(0, correction=0)) if training else (0.0, torch.ones(C, dtype=torch.float64))
        y = (x - mean) / torch.sqrt(var + 1e-5)
        return y if activation is None else torch.nn.functional.gelu(y)

    jacobian = torch.autograd.functional.jacobian(formula, x).reshape(6 * C, 6 * C)
    expected = (jacobian.T if transform is under_grad else jacobian) @ v.flatten()
    # 30 products of float64.
    torch.testing.assert_close(transform(layer, x, v).flatten(), expected, rtol=1e-11, atol=1e-11)


@uses_jvp
@capturing
def test_eval_under_a_transform_causes_no_warning(transform):
    transform(bn.BatchNorm1d(C).eval(), randn(6, C), randn(6, C, seed=1))


def test_after_a_transform_the_layer_updates_its_statistics_again():
    layer, x, v = bn.BatchNorm1d(C), randn(6, C), randn(6, C, seed=1)
    with pytest.warns(UserWarning, match=r"batchnorm\.normalize"):
        under_grad(layer, x, v)
    layer(x)
    torch.testing.assert_close(layer.running_mean, 0.1 * x.mean(0), rtol=1e-5, atol=1e-6)
    assert layer.num_batches_tracked == 1


@pytest.mark.parametrize("nested", [False, True])
def test_under_vmap_captured_statistics_are_refused_and_unchanged(nested):
    layer, x = bn.BatchNorm1d(C), randn(4, 6, C)
    before = copied_buffers(layer)
    run = grad(lambda x: layer(x).square().sum()) if nested else layer
    with pytest.raises(bn.InputError, match=r"vmap.*batchnorm\.normalize"):
        vmap(run)(x)
    assert_same_buffers(layer, before)


@pytest.mark.parametrize("options", [{"track_running_stats": False}, {}, {"renorm": bn.Renorm(2.0, 1.0)}], ids=str)
def test_under_vmap_a_layer_that_updates_nothing_equals_a_loop(options):
    layer, x = bn.BatchNorm1d(C, **options), randn(4, 6, C)
    if layer.track_running_stats:
        layer.eval()
    torch.testing.assert_close(vmap(layer)(x), torch.stack([layer(each) for each in x]), **CLOSE)


@pytest.mark.parametrize("options", [{}, {"virtual_batch_size": 3}], ids=str)
def test_gradients_with_a_graph_equal_those_without_with_renorm_too(options):
    layer = bn.BatchNorm1d(C, renorm=bn.Renorm(3.0, 5.0), **options)
    torch.nn.init.normal_(layer.weight)
    x, v = (randn(7, C) * 2 + 1).requires_grad_(), randn(7, C, seed=1)
    leaves = [x, layer.weight, layer.bias]
    y = layer(x)
    plain = torch.autograd.grad(y, leaves, v, retain_graph=True)
    for mine, theirs in zip(torch.autograd.grad(y, leaves, v, create_graph=True), plain, strict=True):
        torch.testing.assert_close(mine, theirs, **CLOSE)
