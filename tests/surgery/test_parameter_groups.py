"""Groups of parameters for an optimizer: who decays, who does not, and that nobody is missing."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize

import batchnorm as bn
from support import compiles, randn


class Scaled(nn.Module):
    """A model with parameters of all kinds: biases of two dimensions, scales, tokens and a table."""

    def __init__(self, norm=bn.BatchNorm1d):
        super().__init__()
        torch.manual_seed(0)
        self.token = nn.Parameter(torch.zeros(1, 4))
        self.scale = nn.Parameter(torch.ones(4))
        self.temperature = nn.Parameter(torch.ones(()))
        self.position_bias_table = nn.Parameter(torch.zeros(3, 3))
        self.body = nn.Sequential(nn.Linear(4, 4), norm(4), nn.ReLU())
        self.attention = nn.MultiheadAttention(4, 1, add_bias_kv=True)
        self.norm = nn.LayerNorm((2, 4))
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        return self.head(self.body(x + self.token) * self.scale * self.temperature)


def names(model, **options):
    """Return the names of the parameters with and without weight decay."""
    found = {True: [], False: []}
    for group in bn.param_groups(model, 0.1, named=True, **options):
        found[group["weight_decay"] > 0] += group["param_names"]
    return found[True], found[False]


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), bn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))


# Who decays.


@pytest.mark.parametrize("norm", [bn.BatchNorm1d, nn.BatchNorm1d, nn.SyncBatchNorm], ids=["ours", "torch", "sync"])
def test_gamma_beta_biases_and_scales_do_not_decay(norm):
    decayed, exempt = names(Scaled(norm))
    assert decayed == ["token", "body.0.weight", "attention.in_proj_weight", "attention.out_proj.weight", "head.weight"]
    assert {"scale", "temperature", "position_bias_table", "body.1.weight", "body.1.bias", "norm.weight"} < {*exempt}
    assert {"attention.in_proj_bias", "attention.bias_k", "body.0.bias", "head.bias"} < {*exempt}


def test_every_parameter_is_in_one_group_once():
    model = Scaled()
    model.again, model.tied = model.body, nn.Linear(4, 4)
    model.tied.weight = model.body[0].weight
    groups = bn.param_groups(model, 0.1)
    members = [parameter for group in groups for parameter in group["params"]]
    assert len(members) == len({*members})
    assert {*members} == {*model.parameters()}


def test_without_weight_decay_the_groups_are_the_same_and_decay_is_zero():
    assert [group["weight_decay"] for group in bn.param_groups(network(), 0)] == [0, 0.0]


def test_a_group_without_members_is_left_out():
    assert len(bn.param_groups(nn.BatchNorm1d(3), 0.1)) == 1


def test_further_names_are_exempt_by_patterns():
    decayed, exempt = names(Scaled(), no_decay=["token", "attention.*_weight"])
    assert "token" in exempt
    assert "attention.in_proj_weight" in exempt
    assert "head.weight" in decayed


def test_names_that_a_model_exempts_by_itself_do_not_decay():
    class Model(Scaled):
        def no_weight_decay(self):
            return {"token"}

    assert "token" in names(Model())[1]


def test_a_parametrized_tensor_counts_as_what_it_is_and_not_as_what_makes_it():
    class Sum(nn.Module):
        def forward(self, rows):
            return rows.sum(0)

        def right_inverse(self, vector):
            return torch.stack([vector, torch.zeros_like(vector)])

    model = network()
    parametrize.register_parametrization(model[1], "weight", Sum())
    parametrize.register_parametrization(model[0], "bias", Sum())
    parametrizations.weight_norm(model[3])
    decayed, exempt = names(model)
    assert decayed == [
        "0.weight",
        "3.parametrizations.weight.original0",
        "3.parametrizations.weight.original1",
    ]
    assert "1.parametrizations.weight.original" in exempt
    assert "0.parametrizations.bias.original" in exempt


def test_weights_of_modules_whose_names_only_begin_with_norm_decay():
    class NormLinear(nn.Linear):
        pass

    assert names(NormLinear(2, 3)) == (["weight"], ["bias"])


# Options of groups.


def test_options_make_groups_of_their_own_and_the_first_pattern_counts():
    options = {"0.*": {"lr": 0.5}, "*.bias": {"lr": 0.25, "momentum": 0.0}}
    groups = bn.param_groups(network(), 0.1, options=options, named=True)
    assert [(group["param_names"], group["weight_decay"], group.get("lr")) for group in groups] == [
        (["3.weight"], 0.1, None),
        (["1.weight"], 0.0, None),
        (["0.weight"], 0.1, 0.5),
        (["0.bias"], 0.0, 0.5),
        (["1.bias", "3.bias"], 0.0, 0.25),
    ]


def test_a_weight_decay_among_the_options_is_for_weights_alone():
    groups = bn.param_groups(network(), 0.1, options={"0.*": {"weight_decay": 0.5}}, named=True)
    assert [(group["param_names"], group["weight_decay"]) for group in groups] == [
        (["3.weight"], 0.1),
        (["1.weight", "1.bias", "3.bias"], 0.0),
        (["0.weight"], 0.5),
        (["0.bias"], 0.0),
    ]


def test_frozen_parameters_stay_in_their_groups_and_train_once_they_are_unfrozen():
    model = bn.freeze(network(), affine=True)
    optimizer = torch.optim.SGD(bn.param_groups(model, 0.1), lr=0.1)
    before = model[1].weight.clone()
    for expected in (True, False):
        model(randn(5, 4)).square().sum().backward()
        optimizer.step()
        assert torch.equal(model[1].weight, before) is expected
        bn.unfreeze(model)


def test_frozen_parameters_are_left_out_on_request():
    model = bn.freeze(network(), affine=True)
    assert names(model, frozen=False) == (["0.weight", "3.weight"], ["0.bias", "3.bias"])


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW, torch.optim.Adam])
def test_torchs_optimizers_keep_the_names_in_their_state(kind):
    optimizer = kind(bn.param_groups(network(), 0.1, named=True), lr=0.1)
    saved = optimizer.state_dict()["param_groups"]
    assert [group["param_names"] for group in saved] == [
        ["0.weight", "3.weight"],
        ["0.bias", "1.weight", "1.bias", "3.bias"],
    ]


# Training.


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_the_optimizer_trains_as_one_with_groups_written_by_hand(dtype):
    model = network().to(dtype)
    twin = copy.deepcopy(model)
    first, norm, _, last = twin
    by_hand = [
        {"params": [first.weight, last.weight], "weight_decay": 0.1},
        {"params": [first.bias, norm.weight, norm.bias, last.bias], "weight_decay": 0.0},
    ]
    optimizers = [torch.optim.AdamW(groups, lr=0.01, eps=1e-3) for groups in (bn.param_groups(model, 0.1), by_hand)]
    undecayed = norm.weight.clone()
    for seed in range(5):
        for one, optimizer in zip((model, twin), optimizers, strict=True):
            optimizer.zero_grad()
            one(randn(8, 4, seed=seed).to(dtype)).square().mean().backward()
            optimizer.step()
    assert not torch.equal(norm.weight, undecayed)
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_gamma_without_a_gradient_does_not_decay():
    model = network()
    optimizer = torch.optim.SGD(bn.param_groups(model, 0.5), lr=0.1)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    assert torch.equal(model[1].weight, torch.ones(8))


@compiles
def test_a_compiled_model_has_the_names_of_its_own():
    assert names(torch.compile(network(), backend="eager")) == names(network())


# Errors.


@pytest.mark.parametrize("wrong", [-0.1, float("nan"), float("inf"), "0.1", None, True])
def test_a_weight_decay_out_of_range_is_an_error(wrong):
    with pytest.raises(bn.InputError, match="weight_decay must be a finite number from 0; got"):
        bn.param_groups(network(), wrong)


def test_a_lazy_layer_is_named():
    with pytest.raises(bn.InputError, match=r"got 1\.weight of a lazy layer that has seen no batch\. Run the model"):
        bn.param_groups(nn.Sequential(nn.ReLU(), bn.LazyBatchNorm1d()), 0.1)


@pytest.mark.parametrize("argument", ["no_decay", "options"])
def test_a_pattern_without_a_match_is_an_error_with_close_names(argument):
    value = "1.weights" if argument == "no_decay" else {"1.weights": {"lr": 1.0}}
    with pytest.raises(
        bn.InputError, match=rf"in {argument} must match a parameter; got '1\.weights'\. Close.*1\.weight"
    ):
        bn.param_groups(network(), 0.1, **{argument: value})


def test_options_that_are_no_mapping_of_mappings_are_a_type_error():
    for wrong in ([("0.*", {})], {"0.*": 0.1}):
        with pytest.raises(bn.InputTypeError, match="options must map patterns of names"):
            bn.param_groups(network(), 0.1, options=wrong)


def test_options_cannot_give_the_parameters():
    with pytest.raises(bn.InputError, match="must not have params"):
        bn.param_groups(network(), 0.1, options={"0.*": {"params": []}})


def test_a_model_without_parameters_is_an_error():
    with pytest.raises(bn.InputError, match="must have a parameter; ReLU has none"):
        bn.param_groups(nn.ReLU(), 0.1)
    with pytest.raises(bn.InputError, match="must have a parameter that requires gradients; Linear has none"):
        bn.param_groups(nn.Linear(2, 2).requires_grad_(False), 0.1, frozen=False)


def test_a_list_of_parameters_is_a_type_error():
    with pytest.raises(bn.InputTypeError, match=r"must be a torch\.nn\.Module; got list"):
        bn.param_groups([*network().parameters()], 0.1)
