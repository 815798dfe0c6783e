"""Layers put into networks that have none: where they come, what stays, and training that works with them alone."""

import copy
import pickle

import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

import batchnorm as bn
from batchnorm.errors import InputError, InputTypeError
from support import randn


def mlp(activation=nn.ReLU):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), activation(), nn.Dropout(0.1), nn.Linear(8, 6), activation(), nn.Linear(6, 3))


class Functional(nn.Module):
    """A network as notebooks write it: functions, a reused module, a flag of the mode."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv1, self.conv2 = nn.Conv2d(1, 4, 3), nn.Conv2d(4, 6, 3)
        self.relu = nn.ReLU(inplace=True)
        self.fc1, self.fc2 = nn.Linear(24, 10), nn.Linear(10, 3)

    def forward(self, x):
        x = F.relu(F.max_pool2d(self.conv1(x), 2))
        x = self.relu(self.conv2(x)).flatten(1)
        x = F.dropout(torch.tanh(self.fc1(x)), 0.2, training=self.training)
        return self.fc2(x)


IMAGES = randn(8, 1, 10, 10)


def children(model):
    return [(name, type(child).__name__) for name, child in model.named_children()]


# Places and names.


def test_before_puts_a_layer_between_each_hidden_layer_and_its_nonlinearity():
    model, report = bn.insert(mlp())
    names = ["0", "0_bn", "1", "2", "3", "3_bn", "4", "5"]
    assert [name for name, _ in children(model)] == names
    assert [type(model.get_submodule(f"{i}_bn")) for i in (0, 3)] == [bn.BatchNorm1d] * 2
    assert [(layer.path, layer.after) for layer in report.layers] == [
        ("0", "Linear, BatchNorm1d"),
        ("3", "Linear, BatchNorm1d"),
    ]
    assert [(left.path, left.reason) for left in report.left] == [("5", "an output layer")]


def test_after_puts_a_layer_behind_the_nonlinearity():
    model, report = bn.insert(mlp(), "after")
    assert [name for name, _ in children(model)] == ["0", "1", "1_bn", "2", "3", "4", "4_bn", "5"]
    assert report.layers[0].after == "Linear, ReLU, BatchNorm1d"


@pytest.mark.parametrize("placement", ["before", "after"])
def test_a_forward_of_functions_calls_the_new_layers_where_they_belong(placement):
    given = Functional().double()
    model, _ = bn.insert(given, placement)
    one, two = bn.BatchNorm2d(4, dtype=torch.float64), bn.BatchNorm2d(6, dtype=torch.float64)
    three, x = bn.BatchNorm1d(10, dtype=torch.float64), IMAGES.double()
    if placement == "before":
        x = F.relu(F.max_pool2d(one(given.conv1(x)), 2))
        x = F.relu(two(given.conv2(x))).flatten(1)
        expected = given.fc2(torch.tanh(three(given.fc1(x))))
    else:
        x = one(F.relu(F.max_pool2d(given.conv1(x), 2)))
        x = two(F.relu(given.conv2(x))).flatten(1)
        expected = given.fc2(three(torch.tanh(given.fc1(x))))
    model.training = False  # without dropout, while the layers use the statistics of the batch
    assert torch.allclose(model(IMAGES.double()), expected, atol=1e-12)


def test_all_names_of_the_state_dict_stay():
    given = Functional()
    model, _ = bn.insert(given, "after")
    assert given.state_dict().keys() <= model.state_dict().keys()
    missing, unexpected = model.load_state_dict(given.state_dict(), strict=False)
    assert unexpected == []
    assert {name.split(".")[0] for name in missing} == {"conv1_bn", "conv2_bn", "fc1_bn"}


def test_before_drops_the_bias_that_beta_replaces_and_says_so():
    model, report = bn.insert(mlp())
    assert [model.get_submodule(name).bias is None for name in ("0", "3", "5")] == [True, True, False]
    assert "2 biases were dropped, since beta takes the place." in report.notes
    model, report = bn.insert(mlp(), "after")
    assert all(layer.bias is not None for layer in model.modules() if isinstance(layer, nn.Linear))


def test_a_name_that_is_taken_gets_a_number():
    class Model(Functional):
        def __init__(self):
            super().__init__()
            self.conv1_bn = "taken"

    model, _ = bn.insert(Model())
    assert model.conv1_bn == "taken"
    assert isinstance(model.conv1_bn2, bn.BatchNorm2d)


def test_a_model_with_its_own_forward_can_be_copied_and_pickled():
    model, _ = bn.insert(Functional())
    model.eval()
    expected = model(IMAGES)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert isinstance(twin, Functional)
        assert torch.equal(twin(IMAGES), expected)


def test_the_new_forward_still_obeys_the_mode():
    model, _ = bn.insert(Functional(), "after")
    assert not torch.equal(model.train()(IMAGES), model(IMAGES))  # dropout
    assert torch.equal(model.eval()(IMAGES), model(IMAGES))


# The model that is given.


def test_the_model_given_stays_as_it_is_by_default():
    given = Functional()
    before = copy.deepcopy(given)
    model, report = bn.insert(given)
    assert type(given) is Functional
    assert str(given) == str(before)
    assert all(torch.equal(a, b) for a, b in zip(given.parameters(), before.parameters(), strict=True))
    assert not {*map(id, given.parameters())} & {*map(id, model.parameters())}
    assert any("make a new optimizer" in note for note in report.notes)


def test_inplace_keeps_the_other_parameters():
    given = Functional()
    weights = [layer.weight for layer in (given.conv1, given.conv2, given.fc1, given.fc2)]
    model, report = bn.insert(given, inplace=True)
    assert model is given
    assert [layer.weight for layer in (model.conv1, model.conv2, model.fc1, model.fc2)] == weights
    assert not any("copies" in note for note in report.notes)
    assert "3 biases were dropped, since beta takes the place." in report.notes


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_new_layers_have_dtype_and_mode_of_the_hidden_layer(dtype):
    given = mlp().to(dtype)
    given[3].eval()
    model, _ = bn.insert(given)
    new = [model.get_submodule(name) for name in ("0_bn", "3_bn")]
    assert [layer.weight.dtype for layer in new] == [dtype, dtype]
    assert new[0].running_var.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert [layer.training for layer in new] == [True, False]
    assert model.train()(randn(5, 4).to(dtype)).dtype == dtype


def test_new_layers_are_on_the_device_of_the_hidden_layer():
    with torch.device("meta"):
        given = mlp()
    model, _ = bn.insert(given)
    assert {values.device.type for values in (*model.parameters(), *model.buffers())} == {"meta"}


def test_options_reach_the_new_layers():
    model, _ = bn.insert(mlp(), momentum=None, eps=1e-3, virtual_batch_size=4)
    layer = model.get_submodule("0_bn")
    assert (layer.momentum, layer.epsilon(), layer.virtual_batch_size) == (None, 1e-3, 4)


def test_a_second_insertion_leaves_everything_alone():
    for given in (mlp(), Functional()):
        once, _ = bn.insert(given)
        twice, report = bn.insert(once)
        assert report.layers == ()
        assert str(twice) == str(once)


# Linear layers on other shapes than (N, C).


@pytest.mark.parametrize("shape", [(9, 4), (3, 7, 4), (2, 3, 5, 4)])
@pytest.mark.parametrize("placement", ["before", "after"])
def test_channels_of_linear_layers_are_last_with_any_number_of_dimensions(shape, placement):
    x = randn(*shape)
    model, _ = bn.insert(mlp(), placement, example=x)
    model.train()(x)
    seen = []
    name = "3_bn" if placement == "before" else "4_bn"
    model.get_submodule(name).register_forward_hook(lambda module, given, output: seen.append(output))
    model(x)
    rows = seen[0].reshape(-1, 6)
    assert rows.mean(0).abs().max() < 1e-6


def test_without_an_example_linear_layers_take_rows_and_sequences():
    model, _ = bn.insert(mlp())
    for shape in ((9, 4), (3, 6, 4)):  # in the second one, dimension 1 has the size of a layer
        model.train()(randn(*shape))
    assert model.get_submodule("3_bn").channel_dim == -1


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("transposed", [False, True])
def test_convolutions_of_all_dimensions(dims, transposed):
    kind = getattr(nn, f"Conv{'Transpose' if transposed else ''}{dims}d")
    given = nn.Sequential(kind(2, 4, 3), nn.ReLU(), kind(4, 3, 3))
    model, _ = bn.insert(given)
    assert type(model.get_submodule("0_bn")) is getattr(bn, f"BatchNorm{dims}d")
    model(randn(2, 2, *[6] * dims))


# Nonlinearities of all kinds.

MODULES = [nn.ReLU, nn.GELU, nn.Tanh, nn.Sigmoid, nn.SiLU, nn.LeakyReLU, nn.ELU, nn.Softplus, nn.PReLU, nn.Hardswish]
FUNCTIONS = {
    "F.relu": F.relu,
    "torch.relu_": torch.relu_,
    "F.leaky_relu": lambda x: F.leaky_relu(x, 0.2, inplace=True),
    "torch.tanh": torch.tanh,
    "x.relu()": lambda x: x.relu(),
    "x.sigmoid_()": lambda x: x.sigmoid_(),
    "F.gelu": lambda x: F.gelu(x, approximate="tanh"),
    "clamp": lambda x: x.clamp(min=0),
    "x * sigmoid(x)": lambda x: x * torch.sigmoid(x),
    "mish": lambda x: x * torch.tanh(F.softplus(x)),
    "gelu by hand": lambda x: 0.5 * x * (1 + torch.tanh(0.8 * (x + 0.044715 * x**3))),
    "hard swish by hand": lambda x: x * F.relu6(x + 3) / 6,
    "sin": lambda x: torch.sin(30 * x),
}


class Swish(nn.Module):
    def forward(self, x):
        return x * torch.sigmoid(x)


class Applied(nn.Module):
    def __init__(self, function):
        super().__init__()
        torch.manual_seed(0)
        self.function, self.first, self.last = function, nn.Linear(4, 8), nn.Linear(8, 3)

    def forward(self, x):
        return self.last(self.function(self.first(x)))


@pytest.mark.parametrize("kind", [*MODULES, Swish, lambda: nn.ReLU(inplace=True)])
def test_nonlinearities_that_are_modules(kind):
    assert [layer.path for layer in bn.insert(mlp(kind), "after")[1].layers] == ["0", "3"]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_nonlinearities_that_are_functions_are_whole_before_a_layer_comes_behind(name):
    given = Applied(FUNCTIONS[name]).double()
    x = randn(16, 4, dtype=torch.float64)
    for placement in ("before", "after"):
        model, report = bn.insert(given, placement, example=x)
        assert [layer.path for layer in report.layers] == ["first"]
        z = given.first(x)
        normalize = bn.BatchNorm1d(8, dtype=torch.float64)
        f = FUNCTIONS[name]
        hidden = f(normalize(z)) if placement == "before" else normalize(f(z.clone()))
        assert torch.allclose(model.train()(x), given.last(hidden), atol=1e-12)


# Refusals.


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"placement": "between"}, InputError, "placement must be 'before' or 'after'; got 'between'"),
        ({"preserve": True}, InputError, "preserve=True needs an example"),
        ({"preserve": True, "example": IMAGES, "affine": False}, InputError, "got affine=False"),
        ({"activation": "relu"}, InputError, "activation of a new layer follows from its place"),
        ({"momentum": -1}, InputError, "momentum must be"),
        ({"example": randn(2, 3)}, InputError, r"got shape \(2, 3\)"),
        ({"example": [], "preserve": True}, InputError, "the loader"),
        ({"example": 3}, InputTypeError, "example must be"),
    ],
)
def test_arguments_are_checked_before_the_model_changes(arguments, error, message):
    given = Functional()
    before = str(given)
    with pytest.raises(error, match=message):
        bn.insert(given, inplace=True, **arguments)
    assert str(given) == before
    assert type(given) is Functional


def test_models_without_layers_and_lazy_ones_are_refused():
    with pytest.raises(InputError, match="linear layers or convolutions; LSTM has none"):
        bn.insert(nn.LSTM(3, 4))
    with pytest.raises(InputError, match="got a lazy LazyLinear at 0"):
        bn.insert(nn.Sequential(nn.LazyLinear(3), nn.ReLU(), nn.LazyLinear(2)))
    with pytest.raises(InputTypeError, match=r"takes a torch\.nn\.Module"):
        bn.insert(mlp)


# Training.

DIGITS = load_digits()
X, Y = torch.tensor(DIGITS.data / 16, dtype=torch.float32), torch.tensor(DIGITS.target)


def eight_layers():
    layers = []
    for _ in range(8):
        layers += [nn.Linear(64, 64), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(64, 10))


def vgg_like():
    layers, channels = [nn.Unflatten(1, (1, 8, 8))], 1
    for width in (8, 8, "pool", 16, 16, "pool", 16, 16, 16):
        if width == "pool":
            layers.append(nn.MaxPool2d(2))
        else:
            layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()]
            channels = width
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))


def accuracy(model, seed):
    """The accuracy on digits that the model was not trained on, after three epochs at a learning rate of 0.1."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(X), generator=generator)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model.train()
    for _ in range(3):
        for batch in order[:1200][torch.randperm(1200, generator=generator)].split(60):
            optimizer.zero_grad()
            F.cross_entropy(model(X[batch]), Y[batch]).backward()
            optimizer.step()
    with torch.no_grad():
        return (model.eval()(X[order[1200:]]).argmax(1) == Y[order[1200:]]).double().mean().item()


@pytest.mark.parametrize(("network", "seeds"), [(eight_layers, 3), (vgg_like, 2)])
def test_deep_networks_train_with_the_inserted_layers_and_not_without(network, seeds):
    for seed in range(seeds):
        torch.manual_seed(seed)
        given = network()
        before, after = bn.insert(given)[0], bn.insert(given, "after")[0]
        assert accuracy(given, seed) < 0.2
        assert accuracy(before, seed) > 0.8
        assert accuracy(after, seed) > 0.8
