"""`update_optimizer`: groups and state of an optimizer, for the parameters of the model that surgery made."""

import copy
import re

import pytest
import torch
from torch import nn

import batchnorm as bn
from batchnorm.surgery import update_optimizer
from support import randn

OPTIMIZERS = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True),
    "SGD fused": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, fused=True),
    "Adam foreach": lambda p: torch.optim.Adam(p, lr=0.01, foreach=True),
    "Adam fused": lambda p: torch.optim.Adam(p, lr=0.01, fused=True, amsgrad=True),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.01),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.5, centered=True),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=0.01),
    "Adafactor": lambda p: torch.optim.Adafactor(p, lr=0.01),
    "Rprop": lambda p: torch.optim.Rprop(p, lr=0.01),
}


def network(norm=nn.BatchNorm1d):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), norm(6), nn.ReLU(), nn.Linear(6, 3)).double()


def steps(model, optimizer, numbers):
    """Return the losses of training steps."""
    losses = []
    for seed in numbers:
        loss = (model(randn(16, 4, seed=seed, dtype=torch.float64)) - 1).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def params(optimizer):
    return [group["params"] for group in optimizer.param_groups]


def assert_same_objects(found, expected):
    assert list(map(id, found)) == list(map(id, expected))


# Training goes on.


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_training_goes_on_with_the_losses_of_the_model(name):
    model, twin = network(), network()
    optimizer, other = OPTIMIZERS[name](model.parameters()), OPTIMIZERS[name](twin.parameters())
    assert steps(model, optimizer, range(5)) == steps(twin, other, range(5))
    made, _ = bn.convert(model)
    assert update_optimizer(model, made, optimizer) is optimizer
    assert_same_objects(params(optimizer)[0], made.parameters())
    assert set(optimizer.state) == set(made.parameters())
    assert steps(made, optimizer, range(5, 25)) == pytest.approx(steps(twin, other, range(5, 25)), rel=1e-9)


def test_the_state_is_that_of_the_parameter_of_the_same_name():
    model = network()
    optimizer = OPTIMIZERS["AdamW"](model.parameters())
    steps(model, optimizer, range(3))
    before = {name: copy.deepcopy(optimizer.state[p]) for name, p in model.named_parameters()}
    made, _ = bn.convert(model)
    update_optimizer(model, made, optimizer)
    for name, parameter in made.named_parameters():
        assert optimizer.state[parameter].keys() == before[name].keys()
        for key, values in before[name].items():
            assert torch.equal(optimizer.state[parameter][key], values)


def test_lbfgs_goes_on_with_parameters_of_the_same_shapes_alone():
    model, twin = network(), network()
    optimizer, other = (torch.optim.LBFGS(each.parameters(), lr=0.5, max_iter=3) for each in (model, twin))

    def step(network, lbfgs):
        def closure():
            lbfgs.zero_grad()
            loss = (network.eval()(randn(16, 4, dtype=torch.float64)) - 1).square().mean()
            loss.backward()
            return loss

        return lbfgs.step(closure).item()

    step(model, optimizer), step(twin, other)
    made, _ = bn.convert(model)
    update_optimizer(model, made, optimizer)
    assert step(made, optimizer) == pytest.approx(step(twin, other), rel=1e-9)
    with pytest.raises(bn.UnsupportedError, match="LBFGS has one history of all parameters"):
        update_optimizer(made, nn.Sequential(made[0]), optimizer)


def test_a_scheduler_goes_on():
    model = network()
    optimizer = OPTIMIZERS["SGD"](model.parameters())
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    made, _ = bn.convert(model)
    update_optimizer(model, made, optimizer)
    steps(made, optimizer, [0])
    scheduler.step()
    assert optimizer.param_groups[0]["lr"] == 0.025


# Groups.


def test_groups_keep_their_options_and_names():
    model = network()
    decayed = [("0.weight", model[0].weight), ("3.weight", model[3].weight)]
    rest = [(name, p) for name, p in model.named_parameters() if p.dim() == 1]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": rest, "lr": 0.5}]
    optimizer = torch.optim.AdamW(groups, lr=0.1, weight_decay=0.0)
    made, _ = bn.to_torch(bn.convert(model, activation="relu")[0])
    update_optimizer(model, made, optimizer)
    first, second = optimizer.param_groups
    assert (first["weight_decay"], first["lr"], second["lr"]) == (0.1, 0.1, 0.5)
    assert_same_objects(first["params"], [made[0].weight, made[3].weight])
    assert_same_objects(second["params"], [made[0].bias, made[1][0].weight, made[1][0].bias, made[3].bias])
    assert second["param_names"] == ["0.bias", "1.0.weight", "1.0.bias", "3.bias"]


def test_a_layer_in_a_sequential_of_its_own_and_back_is_the_same_name():
    model = network(lambda c: bn.BatchNorm1d(c, activation="tanh"))
    optimizer = OPTIMIZERS["SGD"](model.parameters())
    steps(model, optimizer, range(3))
    gamma = optimizer.state[model[1].weight]["momentum_buffer"]
    made, _ = bn.to_torch(model)
    update_optimizer(model, made, optimizer)
    assert optimizer.state[made[1][0].weight]["momentum_buffer"] is gamma
    update_optimizer(made, model, optimizer)
    assert optimizer.state[model[1].weight]["momentum_buffer"] is gamma
    assert_same_objects(params(optimizer)[0], model.parameters())


def test_parameters_that_are_gone_leave_the_groups_and_the_state():
    model = network()
    optimizer = OPTIMIZERS["Adam foreach"](model.parameters())
    steps(model, optimizer, [0])
    made = copy.deepcopy(model)
    made[1] = nn.Identity()
    update_optimizer(model, made, optimizer)
    assert_same_objects(params(optimizer)[0], made.parameters())
    assert set(optimizer.state) == set(made.parameters())


def test_new_parameters_join_the_group_of_those_of_as_many_dimensions_before_them():
    model = nn.Sequential(nn.Linear(4, 6), nn.Identity(), nn.Linear(6, 3))
    weights, biases = [model[0].weight, model[2].weight], [model[0].bias, model[2].bias]
    optimizer = torch.optim.SGD([{"params": weights, "weight_decay": 0.1}, {"params": biases}], lr=0.1)
    made = copy.deepcopy(model)
    made[1] = nn.Sequential(bn.BatchNorm1d(6), nn.Linear(6, 6))
    update_optimizer(model, made, optimizer)
    assert_same_objects(params(optimizer)[0], [made[0].weight, made[2].weight, made[1][1].weight])
    new = [made[1][0].weight, made[1][0].bias, made[1][1].bias]
    assert_same_objects(params(optimizer)[1], [made[0].bias, made[2].bias, *new])


def test_new_parameters_before_all_others_join_the_first_group():
    model = nn.Sequential(nn.Identity(), nn.Linear(4, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    made = copy.deepcopy(model)
    made[0] = bn.BatchNorm1d(4)
    update_optimizer(model, made, optimizer)
    assert len(params(optimizer)[0]) == 4


def test_new_parameters_stay_out_where_their_neighbor_is_not_optimized_or_without_gradient():
    model = nn.Sequential(nn.Linear(4, 6), nn.Identity(), nn.Linear(6, 3), nn.Identity())
    optimizer = torch.optim.SGD(model[2].parameters(), lr=0.1)
    made = copy.deepcopy(model)
    made[1], made[3] = bn.BatchNorm1d(6), bn.freeze(bn.BatchNorm1d(3), affine=True)
    update_optimizer(model, made, optimizer)
    assert_same_objects(params(optimizer)[0], made[2].parameters())


def test_parameters_of_other_models_stay():
    generator, critic = network(), network()
    optimizer = torch.optim.SGD([*generator.parameters(), *critic.parameters()], lr=0.1, momentum=0.9)
    steps(nn.Sequential(generator, nn.Linear(3, 4).double(), critic), optimizer, [0])
    states = {p: optimizer.state[p] for p in critic.parameters()}
    made, _ = bn.convert(generator)
    update_optimizer(generator, made, optimizer)
    assert_same_objects(params(optimizer)[0], [*made.parameters(), *critic.parameters()])
    assert all(optimizer.state[p] is state for p, state in states.items())
    other, _ = bn.convert(critic)
    update_optimizer(critic, other, optimizer)
    assert_same_objects(params(optimizer)[0], [*made.parameters(), *other.parameters()])


def test_shared_parameters_are_optimized_once():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4))
    model[2].weight = model[0].weight
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    made, _ = bn.convert(model)
    update_optimizer(model, made, optimizer)
    assert_same_objects(params(optimizer)[0], made.parameters())
    assert len(params(optimizer)[0]) == 5


def test_a_parameter_of_another_shape_begins_without_state():
    model = network()
    optimizer = OPTIMIZERS["SGD"](model.parameters())
    steps(model, optimizer, [0])
    made = copy.deepcopy(model)
    made[3] = nn.Linear(6, 5).double()
    update_optimizer(model, made, optimizer)
    assert_same_objects(params(optimizer)[0], made.parameters())
    assert made[3].weight not in optimizer.state
    assert made[0].weight in optimizer.state


def test_the_state_takes_the_dtype_of_the_new_parameter():
    model = network()
    optimizer = OPTIMIZERS["AdamW"](model.parameters())
    steps(model, optimizer, [0])
    made = copy.deepcopy(model).float()
    update_optimizer(model, made, optimizer)
    state = optimizer.state[made[0].weight]
    assert state["exp_avg"].dtype == torch.float32
    assert state["step"].item() == 1


def test_in_place_nothing_changes_but_that_new_parameters_are_added():
    model = network()
    optimizer = OPTIMIZERS["SGD"](model.parameters())
    steps(model, optimizer, [0])
    before, state = [*params(optimizer)[0]], dict(optimizer.state)
    bn.convert(model, inplace=True)
    model.append(nn.Linear(3, 3).double())
    update_optimizer(model, model, optimizer)
    assert_same_objects(params(optimizer)[0], [*before[:5], before[5], *model[4].parameters()])
    assert dict(optimizer.state) == state


# Bad input.


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        (lambda m, o: (None, m, o), bn.InputTypeError, "old_model must be a torch.nn.Module; got NoneType"),
        (lambda m, o: (m, "x", o), bn.InputTypeError, "new_model must be a torch.nn.Module; got str"),
        (lambda m, o: (m, m, [m]), bn.InputTypeError, "optimizer must be a torch.optim.Optimizer; got list"),
        (lambda m, o: (network(), network(), o), bn.InputError, "must have parameters of old_model; got SGD with 6"),
    ],
)
def test_wrong_arguments_are_errors(arguments, error, words):
    model = network()
    with pytest.raises(error, match=re.escape(words)):
        update_optimizer(*arguments(model, OPTIMIZERS["SGD"](model.parameters())))


def test_surgery_is_found_from_the_package():
    assert bn.surgery.update_optimizer is update_optimizer


def test_another_model_is_refused_and_the_optimizer_stays():
    old = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8))
    optimizer = torch.optim.SGD(old.parameters(), lr=0.1)
    with pytest.raises(bn.InputError, match="new_model must be what surgery made of old_model"):
        bn.surgery.update_optimizer(old, nn.Linear(3, 3), optimizer)
    assert len(optimizer.param_groups[0]["params"]) == 4
