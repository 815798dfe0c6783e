"""`to_torch`: torch's layers in the place of ours."""

import copy
import re

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize, prune
from torch.nn.utils.fusion import fuse_conv_bn_eval

import batchnorm as bn
from support import assert_same_state, compiles, copied_state, randn

ACTIVATIONS = {
    "relu": nn.ReLU,
    "leaky_relu": nn.LeakyReLU,
    "silu": nn.SiLU,
    "gelu": nn.GELU,
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
}
KINDS = {"1d": (4, 3, 5), "2d": (4, 3, 5, 2), "3d": (4, 3, 2, 2, 3)}
# Torch's kernel and ours round differently: some 10 roundings of 6e-8 in values up to about 8.
CLOSE = {"rtol": 1e-6, "atol": 5e-6}


def trained(model, *shape):
    """Return the model after some steps of training, with other gamma and beta than those of a new layer."""
    with torch.no_grad():
        for i, parameter in enumerate(model.parameters()):
            parameter += 0.3 * randn(*parameter.shape, seed=i)
        for seed in range(3):
            model(randn(*shape, seed=seed) * 2 + 1)
    return model


def network(**options):
    first, second = bn.BatchNorm2d(4, activation="relu", **options), bn.BatchNorm2d(4, **options)
    return nn.Sequential(nn.Conv2d(3, 4, 3), first, nn.ModuleDict({"norm": second})["norm"], nn.Sequential(second))


# Outputs.


@pytest.mark.parametrize("activation", [None, *ACTIVATIONS])
@pytest.mark.parametrize("kind", KINDS)
def test_the_layer_made_computes_the_same_in_eval_and_in_training(kind, activation):
    layer = trained(getattr(bn, f"BatchNorm{kind}")(3, activation=activation, eps=0.1), *KINDS[kind])
    made, report = bn.to_torch(layer)
    norm = made if activation is None else made[0]
    assert type(norm) is getattr(nn, f"BatchNorm{kind}")
    assert activation is None or type(made[1]) is ACTIVATIONS[activation]
    for mode in (True, False):
        x = randn(*KINDS[kind], seed=9)
        torch.testing.assert_close(made.train(mode)(x), layer.train(mode)(x), **CLOSE)
    torch.testing.assert_close(dict(norm.state_dict()), dict(layer.state_dict()), **CLOSE)
    assert [(row.path, row.before) for row in report.layers] == [("", f"BatchNorm{kind}")]


@pytest.mark.parametrize(
    "options",
    [{"affine": False}, {"bias": False}, {"momentum": None}, {"track_running_stats": False}, {"momentum": 0.3}],
    ids=str,
)
def test_the_layer_made_has_torchs_settings(options):
    layer, x = bn.BatchNorm1d(3, eps=0.5, **options), randn(8, 3)
    made, _ = bn.to_torch(layer)
    for _ in range(2):
        torch.testing.assert_close(made(x), layer(x), **CLOSE)
    assert repr(made) == repr(layer)
    torch.testing.assert_close(dict(made.state_dict()), dict(layer.state_dict()), **CLOSE)


def test_a_bfloat16_layer_runs_with_its_statistics_in_bfloat16():
    layer, x = trained(bn.BatchNorm1d(3), 8, 3).bfloat16().eval(), randn(8, 3, dtype=torch.bfloat16)
    made, _ = bn.to_torch(layer)
    assert made.weight.dtype == made.running_var.dtype == torch.bfloat16
    assert made.num_batches_tracked.dtype == torch.int64
    # mean, variance and y are rounded to 8 bits each, of values up to 4
    torch.testing.assert_close(made(x), layer(x), rtol=2**-7, atol=2**-6)


# The model.


def test_a_model_is_copied_and_stays_as_it_is():
    model = trained(network(), 2, 3, 7, 7)
    before, shown = copied_state(model), repr(model)
    made, report = bn.to_torch(model)
    assert not any(isinstance(module, bn.BatchNorm2d) for module in made.modules())
    assert repr(model) == shown
    with torch.no_grad():
        for values in made.state_dict().values():
            values.zero_()
    assert_same_state(dict(model.state_dict()), before)
    assert [row.path for row in report.layers] == ["1", "2"]  # the layer at 2 is used twice
    assert made[2] is made[3][0]


def test_in_place_an_optimizer_goes_on_with_the_same_parameters_and_buffers():
    model = trained(network(), 2, 3, 7, 7)
    tensors = {id(values) for values in (*model.parameters(), *model.state_dict(keep_vars=True).values())}
    made, _ = bn.to_torch(model, inplace=True)
    assert made is model
    assert {id(values) for values in (*made.parameters(), *made.state_dict(keep_vars=True).values())} == tensors


def test_state_dict_names_of_a_layer_with_an_activation_have_a_zero_more():
    made, _ = bn.to_torch(nn.Sequential(bn.BatchNorm1d(3, activation="relu"), bn.BatchNorm1d(3)))
    assert {name.rpartition(".")[0] for name in made.state_dict()} == {"0.0", "1"}


@pytest.mark.parametrize("inplace", [False, True])
def test_modes_gradients_and_attributes_are_kept(inplace):
    model = network()
    model[1].eval()
    model[1].weight.requires_grad = False
    model[2].tag = "mine"
    made, _ = bn.to_torch(model, inplace)
    assert [module.training for module in (made, made[1], made[1][0], made[1][1], made[2])] == [
        True,
        *[False] * 3,
        True,
    ]
    assert not made[1][0].weight.requires_grad
    assert made[1][0].bias.requires_grad
    assert made[2].tag == "mine"
    assert vars(made[2]).keys() - vars(nn.BatchNorm2d(4)).keys() == {"tag"}


def test_a_model_without_layers_of_ours_stays_as_it_is():
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    made, report = bn.to_torch(model, inplace=True)
    assert made is model
    assert report.layers == ()
    assert "no layers of batchnorm's" in str(report)


def test_converting_twice_changes_nothing_more():
    once, _ = bn.to_torch(network())
    again, report = bn.to_torch(once)
    assert repr(again) == repr(once)
    assert report.layers == ()


@pytest.mark.parametrize("inplace", [False, True])
def test_in_a_domain_its_statistics_are_taken(inplace):
    model, x = bn.add_domains(nn.Sequential(bn.BatchNorm1d(3)), ["drawn"]), randn(8, 3)
    with bn.use_domain(model, "drawn"):
        trained(model, 8, 3).eval()
        expected = model(x)
        made, report = bn.to_torch(model, inplace)
    torch.testing.assert_close(made(x), expected, **CLOSE)
    assert set(made.state_dict()) == set(nn.Sequential(nn.BatchNorm1d(3)).state_dict())
    assert report.layers[0].lost == ("domains=['drawn']", "nonfinite='skip'")


@pytest.mark.parametrize("inplace", [False, True])
def test_within_an_adaptation_the_adapted_statistics_are_taken(inplace):
    model, x = trained(nn.Sequential(bn.BatchNorm1d(3)), 8, 3).eval(), randn(64, 3) * 3 + 5
    stored = model(x)
    with bn.adapt(model, [x]):
        expected = model(x)
        made, _ = bn.to_torch(model, inplace)
    assert (stored - expected).abs().max() > 1
    torch.testing.assert_close(made(x), expected, **CLOSE)


def test_an_adaptation_to_each_batch_has_no_equal():
    model = nn.Sequential(bn.BatchNorm1d(3)).eval()
    with bn.adapt(model), pytest.raises(bn.UnsupportedError, match="got 0: adapted to each batch by itself"):
        bn.to_torch(model)


def test_a_frozen_layer_becomes_one_in_eval_mode():
    model = bn.freeze(trained(nn.Sequential(bn.BatchNorm1d(3, activation="tanh")), 8, 3)).train()
    made, report = bn.to_torch(model)
    x = randn(8, 3)
    torch.testing.assert_close(made(x), model(x), **CLOSE)
    assert made[0].training
    assert not made[0][0].training
    assert "frozen_statistics=True" in report.layers[0].lost


# Hooks.


def test_hooks_see_the_output_of_the_activation_and_can_be_removed():
    layer, seen = bn.BatchNorm1d(3, activation="relu"), []
    handles = [layer.register_forward_hook(lambda module, inputs, y: seen.append(y))]
    handles += [layer.register_full_backward_hook(lambda module, dx, dy: seen.append(dy[0]))]
    made, _ = bn.to_torch(layer, inplace=True)
    y = made(randn(4, 3).requires_grad_())
    y.backward(torch.ones(4, 3))
    assert torch.equal(seen[0], y)
    assert torch.equal(seen[1], torch.ones(4, 3))
    for handle in handles:
        handle.remove()
    made(randn(4, 3))
    assert len(seen) == 2


@pytest.mark.parametrize("activation", [None, "relu"])
def test_a_pruned_layer_stays_pruned(activation):
    layer = trained(bn.BatchNorm1d(4, activation=activation), 6, 4)
    prune.l1_unstructured(layer, "weight", 0.5)
    made, _ = bn.to_torch(layer, inplace=True)
    with torch.no_grad():
        layer.weight_orig *= 2
    x = randn(6, 4)
    torch.testing.assert_close(made.eval()(x), layer.eval()(x), **CLOSE)


# Refusals.


class Doubled(bn.BatchNorm1d):
    def forward(self, x):
        return super().forward(x) * 2


class Named(bn.BatchNorm1d):
    """A subclass that computes what its base does."""

    def __init__(self, name, *arguments):
        super().__init__(*arguments)
        self.name = name


def patched():
    layer = bn.BatchNorm1d(3)
    ours = layer.forward
    layer.forward = lambda x: ours(x) * 2
    return layer


def parametrized(activation=None):
    layer = bn.BatchNorm1d(3, activation=activation)
    parametrize.register_parametrization(layer, "weight", nn.Softplus())
    return layer


REFUSED = {
    "channel_dim=-1": lambda: bn.BatchNorm1d(3, channel_dim=-1),
    "any number of dimensions": lambda: bn.BatchNorm(3),
    "a forward of its own": lambda: Doubled(3),
    "BatchNorm1d has a forward of its own": patched,
    "no batch yet, and has an activation": lambda: bn.LazyBatchNorm1d(activation="relu"),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_where_torch_has_no_equal_the_layer_is_named_and_nothing_replaced(reason):
    model = nn.Sequential(bn.BatchNorm1d(3, activation="relu"), nn.Sequential(REFUSED[reason]()))
    before = [*model.modules()]
    with pytest.raises(bn.UnsupportedError, match=rf"got 1\.0: .*{re.escape(reason)}"):
        bn.to_torch(model, inplace=True)
    assert [*model.modules()] == before


def test_a_subclass_that_adds_attributes_alone_is_converted():
    made, report = bn.to_torch(Named("first", 3))
    assert type(made) is nn.BatchNorm1d
    assert made.name == "first"
    assert report.layers[0].before == "Named"


def test_a_lazy_layer_is_converted_after_its_first_batch():
    layer = bn.LazyBatchNorm1d(activation="relu")
    layer(randn(4, 3))
    made, _ = bn.to_torch(layer)
    assert type(made[0]) is nn.BatchNorm1d


@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize("option", ["residual", "mask"])
def test_a_residual_or_mask_is_a_type_error_of_torchs(option, activation):
    made, _ = bn.to_torch(bn.BatchNorm1d(3, activation=activation))
    with pytest.raises(TypeError, match=option):
        made(randn(4, 3), **{option: randn(4, 3)})


# After it, torch's tools do their work.


def test_the_model_made_can_be_fused():
    model = trained(nn.Sequential(nn.Conv2d(3, 4, 3), bn.BatchNorm2d(4, activation="relu")), 2, 3, 7, 7).eval()
    made, _ = bn.to_torch(model)
    fused = nn.Sequential(fuse_conv_bn_eval(made[0], made[1][0]), made[1][1])
    x = randn(2, 3, 7, 7)
    torch.testing.assert_close(fused(x), model(x), rtol=1e-5, atol=1e-5)


@compiles
def test_wrappers_of_compile_are_refused():
    with pytest.raises(
        bn.UnsupportedError, match=r"to_torch takes a model before torch\.compile.*Pass model\._orig_mod"
    ):
        bn.to_torch(torch.compile(network()))


# What convert did, undone.


def test_a_synchronized_layer_becomes_torchs_with_the_same_settings():
    layer = nn.SyncBatchNorm(4, eps=0.1, momentum=None)
    made, report = bn.to_torch(bn.convert(layer)[0])
    assert type(made) is nn.SyncBatchNorm
    assert repr(made) == repr(layer)
    assert vars(made).keys() == vars(layer).keys()
    assert report.layers[0].lost == ("nonfinite='skip'",)
    made, report = bn.to_torch(bn.BatchNorm2d(4, sync=True, activation="relu"))
    assert [type(module) for module in made] == [nn.SyncBatchNorm, nn.ReLU]


def test_without_sync_a_layer_is_torchs_of_its_dimensions():
    model, _ = bn.convert(bn.BatchNorm2d(4, sync=True), sync=False)
    assert type(bn.to_torch(model)[0]) is nn.BatchNorm2d


def test_a_lazy_layer_becomes_torchs_lazy_one():
    made, _ = bn.to_torch(nn.Sequential(bn.LazyBatchNorm1d(eps=0.1)))
    assert type(made[0]) is nn.LazyBatchNorm1d
    made(randn(4, 3))
    assert type(made[0]) is nn.BatchNorm1d
    assert (made[0].num_features, made[0].eps) == (3, 0.1)


@pytest.mark.parametrize("activation", [None, "relu"])
def test_a_parametrized_layer_stays_parametrized(activation):
    layer = parametrized(activation)
    made, _ = bn.to_torch(layer)
    norm = made if activation is None else made[0]
    assert isinstance(norm, nn.BatchNorm1d)
    assert not isinstance(norm, bn.BatchNorm1d)
    x = randn(8, 3)
    torch.testing.assert_close(made(x), layer(x), **CLOSE)
    parametrize.remove_parametrizations(norm, "weight")
    assert type(norm) is nn.BatchNorm1d


@pytest.mark.parametrize("norm", [nn.BatchNorm1d, nn.LazyBatchNorm1d, nn.SyncBatchNorm])
def test_a_converted_model_becomes_what_it_was(norm):
    model = nn.Sequential(nn.Linear(4, 3), norm() if norm is nn.LazyBatchNorm1d else norm(3), nn.ReLU())
    model[1].tag = "mine"
    before = copy.deepcopy(model) if norm is not nn.LazyBatchNorm1d else None
    layer, attributes = model[1], set(vars(model[1]))
    bn.convert(model, inplace=True)
    bn.to_torch(model, inplace=True)
    assert model[1] is layer
    assert type(layer) is norm
    assert set(vars(layer)) == attributes
    if before is not None:
        assert repr(model) == repr(before)
        assert_same_state(dict(model.state_dict()), dict(before.state_dict()))


class WithChildren(nn.BatchNorm2d):
    """As timm's, with dropout between the normalization and the activation."""

    def __init__(self, features):
        super().__init__(features)
        self.drop, self.act = nn.Dropout(0.5), nn.PReLU()

    def forward(self, x):
        return self.act(self.drop(super().forward(x)))


class Silu(nn.BatchNorm2d):
    """An activation that our layers have, as a child and without parameters."""

    def __init__(self, features):
        super().__init__(features)
        self.act = nn.SiLU()

    def forward(self, x):
        return self.act(super().forward(x))


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("kind", [WithChildren, Silu])
def test_a_class_of_the_user_is_given_back_so_that_names_stay(kind, inplace):
    model = trained(nn.Sequential(kind(4)), 2, 4, 3, 3)
    before = copy.deepcopy(model)
    made, report = bn.to_torch(bn.convert(model, inplace)[0], inplace)
    assert type(made[0]) is kind
    assert repr(made) == repr(before)
    assert vars(made[0]).keys() == vars(before[0]).keys()
    assert_same_state(dict(made.state_dict()), dict(before.state_dict()))
    assert report.layers[0].after == kind.__name__
    x = randn(2, 4, 3, 3)
    torch.testing.assert_close(made.eval()(x), before.eval()(x), **CLOSE)


def test_a_class_of_the_user_whose_activation_was_changed_gets_torchs_layers():
    model, _ = bn.convert(nn.Sequential(Silu(4)))
    model[0].activation = "tanh"
    made, report = bn.to_torch(model)
    assert [type(module) for module in made[0]] == [nn.BatchNorm2d, nn.Tanh]
    assert report.layers[0].after == "BatchNorm2d, Tanh"


def test_what_accelerate_gave_a_layer_goes_back_to_its_module():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True))
    made, _ = bn.to_torch(bn.accelerate(model)[0])
    assert repr(made) == repr(model)
    made.load_state_dict(model.state_dict())


def test_a_model_that_calls_a_layer_with_a_residual_is_refused():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = bn.BatchNorm2d(4)

        def forward(self, x):
            return self.norm(x, residual=x)

    model = Block()
    with pytest.raises(bn.UnsupportedError, match="a call of norm with more in"):
        bn.to_torch(model, inplace=True)
    assert type(model.norm) is bn.BatchNorm2d


def test_in_place_lists_and_load_hooks_follow_a_layer_with_an_activation():
    model, seen = network(), []
    model.listed = [model[1]]
    model[1].register_load_state_dict_pre_hook(lambda *_: seen.append(1))
    bn.to_torch(model, inplace=True)
    assert model.listed[0] is model[1]
    assert [type(module) for module in model[1]] == [nn.BatchNorm2d, nn.ReLU]
    model.load_state_dict(model.state_dict())
    assert seen == [1]


def test_layers_of_torchs_are_reported_as_left():
    model = nn.Sequential(nn.BatchNorm1d(3), bn.BatchNorm1d(3))
    _, report = bn.to_torch(model)
    assert [(row.path, row.reason) for row in report.left] == [("0", "it is no layer of batchnorm's")]
    assert "make a new optimizer" in report.notes[0]
    assert bn.to_torch(model, inplace=True)[1].notes == ()


# The report.


def test_the_report_names_each_layer_and_what_is_lost():
    model = nn.ModuleDict({"first": bn.BatchNorm1d(3, activation="relu"), "then": bn.BatchNorm1d(3, unbiased=False)})
    _, report = bn.to_torch(copy.deepcopy(model))
    assert str(report).splitlines() == [
        "layer        before               after",
        "first   BatchNorm1d   BatchNorm1d, ReLU",
        "then    BatchNorm1d         BatchNorm1d",
        "",
        "Lost in training:",
        "nonfinite  all 2 layers",
        "unbiased   then",
        "",
        "The parameters are copies: make a new optimizer, or call",
        "batchnorm.surgery.update_optimizer(old_model, new_model, optimizer).",
    ]
    assert report.layers[1].lost == ("unbiased=False", "nonfinite='skip'")
    assert repr(report) == "Surgery(2 layers changed)"


def test_nothing_is_lost_of_a_layer_that_trains_as_torchs():
    _, report = bn.to_torch(bn.BatchNorm1d(3, nonfinite="propagate"))
    assert report.layers[0].lost == ()
    assert "Lost" not in str(report)
