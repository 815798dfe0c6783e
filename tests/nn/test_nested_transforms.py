"""Running statistics under nested transforms of torch.func: an update needs to be an argument of each of them."""

import warnings

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.func import (
    functional_call,
    functionalize,
    grad,
    hessian,
    jacfwd,
    jacrev,
    jvp,
    linearize,
    vmap,
)

import batchnorm as bn
from support import randn

# torch compiles its formulas for jvp by an interface that it calls deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")

# float64, some hundred operations on numbers of order 10
CLOSE = {"rtol": 1e-11, "atol": 1e-11}
X = randn(8, 4, dtype=torch.float64)


class Formula(nn.BatchNorm1d):
    """Batch normalization written out, without running statistics: torch's own second derivatives are wrong."""

    def forward(self, x):
        mean = x.mean(0)
        return (x - mean) / ((x - mean).square().mean(0) + self.eps).sqrt() * self.weight + self.bias


class Network:
    """A network, its parameters and buffers, a direction, and the loss as a function of parameters and buffers."""

    def __init__(self, kind=bn.BatchNorm1d, **options):
        torch.manual_seed(0)
        layers = [nn.Linear(4, 3), kind(3, **options), nn.Tanh(), nn.Linear(3, 1)]
        self.model = nn.Sequential(*layers).double()
        self.parameters = {name: values.detach() for name, values in self.model.named_parameters()}
        self.buffers = {name: values.clone() for name, values in self.model.named_buffers()}
        self.direction = {name: torch.ones_like(values) for name, values in self.parameters.items()}

    def loss(self, parameters, buffers, x=X):
        return functional_call(self.model, (parameters, buffers), (x,)).square().sum()

    def closed(self, parameters):
        return self.loss(parameters, self.buffers)

    def copies(self, count=2):
        """Return parameters and buffers of an ensemble."""
        return [
            {name: torch.stack([values] * count) for name, values in each.items()}
            for each in (self.parameters, self.buffers)
        ]

    @property
    def batches(self):
        return int(self.buffers["1.num_batches_tracked"])


def numbers(result):
    leaves = torch.utils._pytree.tree_leaves(result)
    return torch.cat([each.detach().reshape(-1) for each in leaves])


def total(gradients):
    return sum(each.sum() for each in gradients.values())


PASSED = {
    "grad": lambda n: grad(n.loss)(n.parameters, n.buffers),
    "grad of grad": lambda n: grad(lambda p, b: total(grad(n.loss)(p, b)))(n.parameters, n.buffers),
    "hessian": lambda n: hessian(n.loss)(n.parameters, n.buffers),
    "jacrev of jacfwd": lambda n: jacrev(jacfwd(n.loss))(n.parameters, n.buffers),
    "jacfwd of jacfwd": lambda n: jacfwd(jacfwd(n.loss))(n.parameters, n.buffers),
    "functionalize": lambda n: functionalize(grad(n.loss))(n.parameters, n.buffers),
}
OUTER_LEVELS_ALONE = {
    "jvp": lambda n: jvp(n.closed, (n.parameters,), (n.direction,)),
    "jvp of grad": lambda n: jvp(lambda p: grad(n.loss)(p, n.buffers), (n.parameters,), (n.direction,)),
    "grad of jvp": lambda n: grad(lambda p: jvp(n.closed, (p,), (n.direction,))[1])(n.parameters),
    "grad of grad": lambda n: grad(lambda p: total(grad(n.loss)(p, n.buffers)))(n.parameters),
    "hessian": lambda n: hessian(n.closed)(n.parameters),
    "vmap of jvp": lambda n: vmap(lambda scale: jvp(n.closed, (n.parameters,), (scaled(n.direction, scale),))[1])(
        torch.ones(2, dtype=torch.float64)
    ),
    "dual tensors": lambda n: dual_loss(n),
}


def scaled(values, scale):
    return {name: each * scale for name, each in values.items()}


def dual_loss(network):
    with forward_ad.dual_level():
        duals = {
            name: forward_ad.make_dual(values, network.direction[name]) for name, values in network.parameters.items()
        }
        loss = network.closed(duals)
        return [each.clone() for each in forward_ad.unpack_dual(loss)]


@pytest.mark.parametrize("name", PASSED)
def test_buffers_that_every_transform_gets_are_updated_once(name):
    network, formula = Network(), Network(Formula)
    torch.testing.assert_close(numbers(PASSED[name](network)), numbers(PASSED[name](formula)), **CLOSE)
    twin = Network()
    twin.loss(twin.parameters, twin.buffers)
    torch.testing.assert_close(network.buffers, twin.buffers, **CLOSE)


@pytest.mark.filterwarnings("ignore:under torch.func.grad, jvp")
@pytest.mark.parametrize("name", OUTER_LEVELS_ALONE)
def test_buffers_that_one_transform_does_not_get_stay_as_they_are(name):
    network, formula = Network(), Network(Formula)
    found, expected = OUTER_LEVELS_ALONE[name](network), OUTER_LEVELS_ALONE[name](formula)
    torch.testing.assert_close(numbers(found), numbers(expected), **CLOSE)
    torch.testing.assert_close(network.buffers, Network().buffers, rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore:under torch.func.grad, jvp")
@pytest.mark.parametrize("inner", [lambda n: n.closed, lambda n: lambda p: grad(n.loss)(p, n.buffers)])
def test_linearize_updates_by_its_forward_alone(inner):
    network = Network()
    with warnings.catch_warnings(action="ignore"):  # torch's own, of its tracer
        _, tangents = linearize(inner(network), network.parameters)
    expected = jvp(inner(network), (network.parameters,), (network.direction,))[1]
    torch.testing.assert_close(numbers(tangents(network.direction)), numbers(expected), **CLOSE)
    assert network.batches == 1


# vmap


@pytest.mark.parametrize("wrapped", [lambda n: n.loss, lambda n: grad(n.loss)], ids=["vmap", "vmap of grad"])
@pytest.mark.parametrize("momentum", [0.1, None])
def test_an_ensemble_updates_the_statistics_of_each_member(wrapped, momentum):
    network = Network(momentum=momentum)
    parameters, buffers = network.copies()
    batches = torch.stack([X, X + 1])
    vmap(wrapped(network))(parameters, buffers, batches)
    for member, x in enumerate(batches):
        alone = Network(momentum=momentum)
        alone.loss(alone.parameters, alone.buffers, x)
        found = {name: values[member] for name, values in buffers.items()}
        torch.testing.assert_close(found, alone.buffers, **CLOSE)


@pytest.mark.parametrize("wrapped", [lambda n: n.loss, lambda n: grad(n.loss)], ids=["vmap", "vmap of grad"])
def test_statistics_that_vmap_does_not_map_over_are_an_error(wrapped):
    network = Network()
    with pytest.raises(bn.InputError, match="under vmap a training batch can't update running statistics"):
        vmap(wrapped(network), in_dims=(0, None))(network.copies()[0], network.buffers)


@pytest.mark.filterwarnings("ignore:under torch.func.grad, jvp")
def test_grad_of_an_ensemble_leaves_captured_statistics_alone():
    network = Network()
    parameters, buffers = network.copies()
    found = grad(lambda p: vmap(network.loss)(p, buffers).sum())(parameters)
    alone = grad(network.loss)(network.parameters, network.buffers)
    torch.testing.assert_close({name: values[1] for name, values in found.items()}, alone, **CLOSE)
    assert buffers["1.num_batches_tracked"].tolist() == [0, 0]


def test_a_batch_that_vmap_does_not_map_over_updates_once():
    network = Network()
    vmap(lambda scale: scale * network.closed(network.parameters))(torch.ones(3, dtype=torch.float64))
    assert network.batches == 1


# Some of the buffers


def test_statistics_are_updated_where_the_librarys_own_counts_are_not_passed():
    network = Network()
    torchs = {name: values for name, values in network.buffers.items() if name in network.model.state_dict()}
    grad(network.loss)(network.parameters, torchs)
    twin = Network()
    grad(twin.loss)(twin.parameters, twin.buffers)
    torch.testing.assert_close(torchs, {name: twin.buffers[name] for name in torchs}, **CLOSE)


@pytest.mark.parametrize("momentum", [0.1, None])
def test_mean_and_variance_are_updated_where_no_count_is_passed(momentum):
    network = Network(momentum=momentum)
    two = {name: network.buffers[name] for name in ("1.running_mean", "1.running_var")}
    grad(network.loss)(network.parameters, two)
    twin = Network(momentum=momentum)
    twin.loss(twin.parameters, twin.buffers)
    torch.testing.assert_close(two, {name: twin.buffers[name] for name in two}, **CLOSE)
    assert int(network.model[1].num_batches_tracked) == 0


def test_an_infinite_batch_is_skipped_where_its_count_is_not_passed():
    network = Network()
    torchs = {name: values for name, values in network.buffers.items() if name in network.model.state_dict()}
    grad(network.loss)(network.parameters, torchs, X * torch.inf)
    assert torch.equal(torchs["1.running_var"], torch.ones(3, dtype=torch.float64))
    assert int(torchs["1.num_batches_tracked"]) == 0
