"""`convert`: layers of any library become ours, as the same objects, and compute what they did."""

import copy
import gc
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrize, prune

import batchnorm as bn
from support import assert_same_state, copied_state, randn, saved_and_loaded

KINDS = {"1d": (4, 3, 5), "2d": (4, 3, 5, 2), "3d": (4, 3, 2, 2, 3)}


class Activated(nn.BatchNorm2d):
    def forward(self, x):
        return F.silu(super().forward(x))


class Relu6(nn.BatchNorm2d):
    def forward(self, x):
        return F.relu6(super().forward(x))


class WithChild(nn.BatchNorm2d):
    """A dropout and an activation as children, in the manner of timm."""

    def __init__(self, features, drop, act):
        super().__init__(features)
        self.drop, self.act = drop, act

    def forward(self, x):
        return self.act(self.drop(super().forward(x)))


class AnyDimension(nn.modules.batchnorm._BatchNorm):
    """As mmengine's layer in the place of SyncBatchNorm."""

    def _check_input_dim(self, x):
        return


class InEval(nn.BatchNorm2d):
    """The common way to freeze: a layer that stays in eval mode."""

    def train(self, mode=True):
        return super().train(False)


class Frozen(nn.Module):
    """As detectron2's, but it refuses a count of batches in a state dict."""

    def __init__(self, features):
        super().__init__()
        self.eps = 1e-3
        for name, value in (("weight", 1.5), ("bias", 0.5), ("running_mean", 0.2), ("running_var", 2.0)):
            self.register_buffer(name, torch.full((features,), value))

    def forward(self, x):
        scale = self.weight * (self.running_var + self.eps).rsqrt()
        return x * scale.view(1, -1, 1, 1) + (self.bias - self.running_mean * scale).view(1, -1, 1, 1)


class Fusing(nn.BatchNorm2d):
    def fuse(self):
        return self


class Own(nn.BatchNorm2d):
    def forward(self, x):
        return 2 * super().forward(x)


def network(norm=nn.BatchNorm2d):
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), norm(4), nn.ReLU(), nn.Conv2d(4, 4, 3), norm(4)).double()


def trained(model, shapes=((4, 3, 9, 9),) * 3):
    """Return the outputs of three training steps."""
    optimizer, outputs = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), []
    for seed, shape in enumerate(shapes):
        torch.manual_seed(seed)
        y = model.train()(randn(*shape, seed=seed, dtype=torch.float64) * 2 + 1)
        optimizer.zero_grad()
        y.square().mean().backward()
        optimizer.step()
        outputs.append(y.detach())
    return outputs


# The same numbers.


@pytest.mark.parametrize(
    "norm",
    [
        nn.BatchNorm2d,
        nn.SyncBatchNorm,
        nn.LazyBatchNorm2d,
        Activated,
        Relu6,
        InEval,
        AnyDimension,
        lambda c: nn.BatchNorm2d(c, momentum=None, eps=0.1),
        lambda c: nn.BatchNorm2d(c, affine=False),
        lambda c: nn.BatchNorm2d(c, track_running_stats=False),
        lambda c: WithChild(c, nn.Dropout(0.5), nn.PReLU()),
        lambda c: WithChild(c, nn.Identity(), nn.GELU("tanh")),
    ],
)
def test_three_training_steps_and_eval_are_those_of_the_model(norm):
    if norm is nn.LazyBatchNorm2d:
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.LazyBatchNorm2d(), nn.ReLU()).double()
    else:
        model = network(norm)
    made, report = bn.convert(model)
    assert not report.left
    for found, expected in zip(trained(made), trained(model), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(dict(made.state_dict()), dict(model.state_dict()), rtol=1e-9, atol=1e-9)
    x = randn(4, 3, 9, 9, dtype=torch.float64)
    torch.testing.assert_close(made.eval()(x), model.eval()(x), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_that_is_a_layer_is_converted(kind):
    layer = getattr(nn, f"BatchNorm{kind}")(3)
    made, _ = bn.convert(layer)
    assert type(made) is getattr(bn, f"BatchNorm{kind}")
    assert type(layer) is getattr(nn, f"BatchNorm{kind}")
    x = randn(*KINDS[kind])
    torch.testing.assert_close(made(x), layer(x), rtol=1e-5, atol=1e-5)
    same, _ = bn.convert(layer, inplace=True)
    assert same is layer
    assert type(layer) is type(made)


@pytest.mark.parametrize(
    ("norm", "kind", "shown"),
    [
        (Activated, bn.BatchNorm2d, "bn.BatchNorm2d with silu"),
        (lambda c: WithChild(c, nn.Identity(), nn.ReLU(inplace=True)), bn.BatchNorm2d, "bn.BatchNorm2d with relu"),
        (lambda c: WithChild(c, nn.Dropout(), nn.ReLU()), bn.BatchNorm2d, "bn.BatchNorm2d, Dropout, ReLU"),
        (Relu6, bn.BatchNorm2d, "bn.BatchNorm2d, ReLU6"),
        (nn.SyncBatchNorm, bn.BatchNorm, "bn.BatchNorm"),
        (nn.LazyBatchNorm2d, bn.LazyBatchNorm2d, "bn.LazyBatchNorm2d"),
    ],
)
def test_the_class_that_a_layer_becomes(norm, kind, shown):
    made, report = bn.convert(norm(4) if norm is not nn.LazyBatchNorm2d else norm())
    assert isinstance(made, kind)
    assert report.layers[0].after == shown
    assert made.sync is (norm is nn.SyncBatchNorm)


# What is kept.


def test_in_place_layers_parameters_buffers_and_lists_are_the_same_objects():
    model = network()
    model.listed = [model[1]]
    layers, tensors = [*model.modules()], [*model.parameters(), *model.buffers()]
    made, report = bn.convert(model, inplace=True)
    assert made is model
    assert [*made.modules()] == layers
    state = made.state_dict(keep_vars=True).values()
    assert all(any(values is other for other in state) for values in tensors)
    assert model.listed[0] is model[1]
    assert type(model[1]) is bn.BatchNorm2d
    assert report.notes == ()


def test_a_copy_leaves_the_model_as_it_was_and_says_that_it_is_one():
    model = network()
    before, shown = copied_state(model), repr(model)
    made, report = bn.convert(model)
    with torch.no_grad():
        for values in made.state_dict().values():
            values.zero_()
    assert repr(model) == shown
    assert_same_state(copied_state(model), before)
    assert "make a new optimizer" in report.notes[0]


def test_hooks_of_all_kinds_go_on_and_their_handles_remove_them():
    model, seen = nn.Sequential(nn.BatchNorm2d(3)), []
    layer = model[0]
    handles = [
        layer.register_forward_pre_hook(lambda *_: seen.append("pre")),
        layer.register_forward_hook(lambda *_: seen.append("forward")),
        layer.register_full_backward_hook(lambda *_: seen.append("backward")),
        layer.register_state_dict_post_hook(lambda module, *_: seen.append(("state", module))),
        layer.register_load_state_dict_pre_hook(lambda module, *_: seen.append(("load", module))),
    ]
    bn.convert(model, inplace=True)
    gc.collect()
    model(randn(2, 3, 4, 4).requires_grad_()).sum().backward()
    model.load_state_dict(model.state_dict())
    assert seen == ["pre", "forward", "backward", ("state", layer), ("load", layer)]
    for handle in handles:
        handle.remove()
    model(randn(2, 3, 4, 4)).sum().backward()
    model.load_state_dict(model.state_dict())
    assert len(seen) == 5


def test_an_activation_with_a_hook_stays_a_module():
    layer, seen = WithChild(3, nn.Identity(), nn.ReLU()), []
    layer.act.register_forward_hook(lambda *_: seen.append(1))
    made, _ = bn.convert(layer, inplace=True)
    assert made.activation is None
    made(randn(2, 3, 4, 4))
    assert seen == [1]


def test_a_layer_in_two_places_stays_one():
    layer = nn.BatchNorm2d(3)
    made, report = bn.convert(nn.ModuleDict({"a": layer, "b": nn.Sequential(layer)}))
    assert made["a"] is made["b"][0]
    assert [row.path for row in report.layers] == ["a"]


@pytest.mark.parametrize("inplace", [False, True])
def test_modes_gradients_and_attributes_are_kept(inplace):
    model = network()
    model[1].eval()
    model[1].weight.requires_grad = False
    model[4].tag = "mine"
    made, _ = bn.convert(model, inplace)
    assert [made.training, made[1].training, made[4].training] == [True, False, True]
    assert [made[1].weight.requires_grad, made[1].bias.requires_grad] == [False, True]
    assert made[4].tag == "mine"


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_dtypes_are_kept_with_statistics_of_at_least_32_bits(dtype):
    made, _ = bn.convert(network().to(dtype))
    assert made[1].weight.dtype == dtype
    assert made[1].running_var.dtype == (dtype if dtype is torch.float64 else torch.float32)


def test_a_model_on_the_meta_device_stays_there_and_can_be_filled():
    with torch.device("meta"):
        model = nn.Sequential(nn.BatchNorm2d(3), Activated(3), Frozen(3))
    made, _ = bn.convert(model)
    assert all(values.is_meta for values in made.state_dict().values())
    made.to_empty(device="cpu").load_state_dict(
        bn.convert(nn.Sequential(nn.BatchNorm2d(3), Activated(3), Frozen(3)))[0].state_dict()
    )
    assert made(randn(2, 3, 4, 4)).isfinite().all()


@pytest.mark.parametrize(
    "norm", [nn.BatchNorm2d, Activated, InEval, Frozen, lambda c: WithChild(c, nn.Identity(), nn.PReLU())]
)
def test_state_dicts_load_strictly_both_ways(norm):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), norm(4))
    made, _ = bn.convert(model)
    for state in (model.state_dict(), dict(model.state_dict()), saved_and_loaded(model.state_dict())):
        made.load_state_dict(state)
    model.load_state_dict(made.state_dict())
    assert set(made.state_dict()) == set(model.state_dict())


def test_a_parametrized_layer_stays_parametrized_until_that_is_removed():
    layer = nn.BatchNorm1d(3)
    parametrize.register_parametrization(layer, "weight", nn.Softplus())
    made, _ = bn.convert(layer)
    x = randn(8, 3)
    torch.testing.assert_close(made(x), layer(x), rtol=1e-5, atol=1e-5)
    assert set(made.state_dict()) == set(layer.state_dict())
    torch.testing.assert_close(copy.deepcopy(made)(x), layer(x), rtol=1e-5, atol=1e-5)
    parametrize.remove_parametrizations(made, "weight")
    assert type(made) is bn.BatchNorm1d


@pytest.mark.parametrize("inplace", [False, True])
def test_a_pruned_layer_stays_pruned(inplace):
    layer = nn.BatchNorm1d(4)
    prune.random_unstructured(layer, "weight", 0.5)
    made, _ = bn.convert(layer, inplace)
    made(randn(8, 4))
    assert int((made.weight == 0).sum()) == 2
    made.weight_orig.data *= 2
    made(randn(8, 4))
    assert made.weight.max() == 2
    prune.remove(made, "weight")
    assert isinstance(made.weight, nn.Parameter)


def test_a_lazy_layer_becomes_one_that_infers_its_channels():
    model = nn.Sequential(nn.LazyConv2d(4, 3), nn.LazyBatchNorm2d(eps=0.1))
    made, _ = bn.convert(model, small_batch="running")
    made(randn(2, 3, 5, 5))
    assert type(made[1]) is bn.BatchNorm2d
    assert (made[1].num_features, vars(made[1])["eps"], made[1].small_batch) == (4, 0.1, "running")


def test_children_behind_a_layer_survive_pickles_and_copies():
    made, _ = bn.convert(WithChild(3, nn.Dropout(0.5), nn.PReLU()))
    made.act.weight.data.fill_(0.7)
    x = randn(4, 3, 2, 2)
    for twin in (pickle.loads(pickle.dumps(made)), copy.deepcopy(made)):
        assert torch.equal(twin.eval()(x), made.eval()(x))
    assert (made.train()(x) == 0).any()


# Frozen layers.


@pytest.mark.parametrize("inplace", [False, True])
def test_gamma_and_beta_that_were_buffers_become_frozen_parameters(inplace):
    layer, x = Frozen(3), randn(4, 3, 2, 2)
    expected = layer(x)
    made, report = bn.convert(nn.Sequential(layer), inplace)
    assert made[0].frozen_statistics
    assert made[0].frozen_affine
    torch.testing.assert_close(made.train()(x), expected, rtol=1e-6, atol=1e-6)
    assert not made[0].weight.requires_grad
    assert "1 frozen layers had gamma and beta as buffers" in report.notes[-1]
    bn.unfreeze(made)
    assert made[0].weight.requires_grad
    made(x)
    assert not torch.equal(made[0].running_mean, torch.full((3,), 0.2))


def test_a_layer_that_stays_in_eval_mode_is_frozen_with_gamma_and_beta_trained():
    made, _ = bn.convert(InEval(3))
    assert made.frozen_statistics
    assert not made.frozen_affine
    assert made.weight.requires_grad


# Options.


def test_options_go_to_the_layers_that_are_ours_already_too():
    model = nn.Sequential(nn.BatchNorm2d(3), bn.BatchNorm2d(3), bn.BatchNorm2d(3, small_batch="running", momentum=0.3))
    made, report = bn.convert(model, small_batch="running", nonfinite="propagate", momentum=0.3)
    assert [layer.small_batch for layer in made] == ["running"] * 3
    assert [layer.nonfinite for layer in made] == ["propagate"] * 3
    assert [layer.momentum for layer in made] == [0.3] * 3
    assert [row.before for row in report.layers] == ["BatchNorm2d", "bn.BatchNorm2d", "bn.BatchNorm2d"]


def test_a_model_that_is_ours_already_is_left_alone():
    model = nn.Sequential(bn.BatchNorm2d(3, activation="relu"))
    made, report = bn.convert(model)
    assert repr(made) == repr(model)
    assert report.layers == ()
    assert [row.reason for row in report.left] == ["it is a layer of batchnorm's already"]


@pytest.mark.parametrize(
    ("norm", "options", "reason"),
    [
        (
            lambda c: nn.BatchNorm2d(c, track_running_stats=False),
            {"small_batch": "running"},
            "uses the running statistics",
        ),
        (nn.SyncBatchNorm, {"virtual_batch_size": 2}, "sync=True and virtual_batch_size exclude each other"),
        (Activated, {"activation": "relu"}, "activation='relu' was given, and it has an activation of its own"),
        (Own, {}, "something else than batch normalization"),
        (Fusing, {}, "its class has fuse, which would be lost"),
    ],
)
def test_a_layer_that_cannot_be_converted_is_left_and_the_others_are_not(norm, options, reason):
    made, report = bn.convert(nn.Sequential(nn.BatchNorm2d(3), norm(3)), **options)
    assert type(made[0]) is bn.BatchNorm2d
    assert type(made[1]) is type(norm(3))
    assert [row.path for row in report.left] == ["1"]
    assert reason in report.left[0].reason


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"num_features": 3}, bn.InputTypeError, "convert takes the options eps, momentum, activation"),
        ({"small_batch": "skip"}, bn.InputError, "small_batch must be 'raise' or 'running'"),
        ({"eps": -1.0}, bn.InputError, "eps must be"),
    ],
)
def test_a_wrong_option_is_an_error_that_changes_nothing(options, error, words):
    model = network()
    with pytest.raises(error, match=words):
        bn.convert(model, inplace=True, **options)
    assert type(model[1]) is nn.BatchNorm2d


def test_an_attribute_with_the_name_of_an_option_is_not_overwritten():
    layer = nn.BatchNorm2d(3)
    layer.activation = "mine"
    made, report = bn.convert(layer)
    assert made.activation == "mine"
    assert "its attribute activation has the name" in report.left[0].reason


# Training goes on.


def test_training_continues_with_the_same_optimizer():
    model = network()
    twin = copy.deepcopy(model)
    losses = {}
    for name, each in (("converted", model), ("stock", twin)):
        optimizer = torch.optim.SGD(each.parameters(), lr=0.05, momentum=0.9)
        losses[name] = []
        for step in range(20):
            if name == "converted" and step == 5:
                bn.convert(each, inplace=True)
            loss = each(randn(8, 3, 9, 9, seed=step, dtype=torch.float64)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[name].append(loss.item())
    assert losses["converted"] == pytest.approx(losses["stock"], rel=1e-9)
