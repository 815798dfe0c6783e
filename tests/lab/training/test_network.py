"""Stacked networks: their outputs, initial weights, and the independence of their runs."""

import math

import pytest
import torch

from batchnorm.errors import InputError
from batchnorm.lab.training.network import ACTIVATIONS, MLP, batch_bounds
from batchnorm.lab.training.settings import check_init


def generators(runs):
    return [torch.Generator().manual_seed(seed) for seed in range(runs)]


@pytest.mark.parametrize("placement", [None, "before", "after"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_a_run_of_a_stack_computes_the_same_as_torch_layers(placement, activation):
    stack = MLP(5, (7, 4), 3, activation=activation, placement=placement, runs=3).double()
    stack.initialize(generators(3))
    layers = []
    for block in stack.hidden:
        weight = block.linear.weight[1]
        linear = torch.nn.Linear(*weight.shape, bias=placement != "before").double()
        linear.weight.data = weight.t()
        if linear.bias is not None:
            linear.bias.data.zero_()
        nonlinearity, norm = ACTIVATIONS[activation](), torch.nn.BatchNorm1d(weight.shape[1]).double()
        layers += {None: [linear, nonlinearity], "before": [linear, norm, nonlinearity]}.get(
            placement, [linear, nonlinearity, norm]
        )
    output = torch.nn.Linear(4, 3).double()
    output.weight.data, output.bias.data = stack.output.weight[1].t(), torch.zeros(3).double()
    x = torch.randn(3, 11, 5, dtype=torch.float64)
    torch.testing.assert_close(stack(x)[1], torch.nn.Sequential(*layers, output)(x[1]))


def test_only_before_drops_the_bias_that_beta_replaces():
    biases = {p: MLP(5, (7,), 3, placement=p).hidden[0].linear.bias for p in (None, "before", "after")}
    assert biases["before"] is None
    assert biases[None] is not None
    assert biases["after"] is not None


def test_every_placement_starts_from_the_same_weights():
    networks = [MLP(5, (7, 4), 3, placement=p, runs=2) for p in (None, "before", "after")]
    for network in networks:
        network.initialize(generators(2))
    for one, two, three in zip(*(network.linears() for network in networks), strict=True):
        assert torch.equal(one.weight, two.weight)
        assert torch.equal(one.weight, three.weight)
        assert one.weight.any()


@pytest.mark.parametrize(
    ("activation", "init", "deviation"),
    [
        ("sigmoid", None, math.sqrt(2 / (400 + 200))),
        ("tanh", None, math.sqrt(2 / (400 + 200))),
        ("relu", None, math.sqrt(2 / 400)),
        ("relu", "xavier", math.sqrt(2 / (400 + 200))),
        ("sigmoid", "gaussian:0.01", 0.01),
    ],
)
def test_initial_weights_have_the_deviation_of_their_rule(activation, init, deviation):
    network = MLP(400, (200,), 3, activation=activation)
    network.initialize(generators(1), init, scale=2.0)
    weight = network.hidden[0].linear.weight
    # the sd of 80,000 draws is within 1% of the true one, at four of its standard errors
    assert weight.std().item() == pytest.approx(2 * deviation, rel=0.01)
    assert abs(weight.mean().item()) < 4 * 2 * deviation / math.sqrt(80_000)


@pytest.mark.parametrize("init", ["glorot", "gaussian", "gaussian:", "gaussian:-1", "gaussian:x"])
def test_an_unknown_rule_for_initial_weights_is_refused(init):
    with pytest.raises(InputError, match="init must be xavier, he or gaussian:SD with a positive SD"):
        check_init(init)


@pytest.mark.parametrize(("rows", "size"), [(7, 3), (6, 3), (1, 3), (61, 60), (60, 60), (119, 60)])
def test_mini_batches_cover_the_rows_once_and_have_more_than_one_row(rows, size):
    bounds = batch_bounds(rows, size)
    assert [row for start, end in bounds for row in range(start, end)] == list(range(rows))
    assert rows == 1 or all(end - start > 1 for start, end in bounds)
    assert all(end - start <= size + 1 for start, end in bounds)


def test_the_state_of_a_run_is_a_view_of_its_own_numbers():
    network = MLP(5, (7,), 3, placement="before", runs=2)
    network.initialize(generators(2))
    with torch.no_grad():
        for tensor in network.run_state():
            tensor[1] = 0
    assert network.hidden[0].linear.weight[0].any()
    assert not network.hidden[0].linear.weight[1].any()
    assert torch.equal(network.hidden[0].norm.running_var, torch.tensor([1.0] * 7 + [0.0] * 7))
