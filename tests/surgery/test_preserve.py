"""Insertion into trained networks that leaves their function as it is."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import batchnorm as bn
from batchnorm.errors import InputError
from support import randn


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.conv1, self.conv2 = (nn.Conv2d(i, 6, 3, padding=1) for i in (3, 6, 6))
        self.act, self.fc, self.head = nn.PReLU(), nn.Linear(6, 12), nn.Linear(12, 4)

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.stem(x)), 2)
        x = self.act(x + self.conv2(F.silu(self.conv1(x)) * 1.0))
        x = F.dropout(torch.tanh(self.fc(x.mean((2, 3)))), 0.5, self.training)
        return self.head(x)


IMAGES = randn(16, 3, 8, 8, dtype=torch.float64) * 3 + 1


def relative_difference(found, expected):
    return ((found - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize("placement", ["before", "after"])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-9), (torch.float32, 1e-4), (torch.bfloat16, 3e-2)])
def test_the_function_stays_in_eval_mode_on_any_input(placement, dtype, bound):
    given = Residual().to(dtype)
    model, report = bn.insert(given, placement, IMAGES.to(dtype), preserve=True)
    assert [layer.path for layer in report.layers] == ["stem", "conv1", "conv2", "fc"]
    assert model.training
    assert report.max_difference <= bound
    for x in (IMAGES, 100 * randn(5, 3, 8, 8, seed=1, dtype=torch.float64)):
        x = x.to(dtype)
        assert relative_difference(model.eval()(x), given.eval()(x)) <= bound


def test_statistics_are_the_moments_of_what_passes_and_gamma_and_beta_undo_them():
    given = Residual().double()
    model, _ = bn.insert(given, "before", IMAGES, preserve=True)
    z = given.stem(IMAGES)
    layer = model.stem_bn
    var, mean = torch.var_mean(z, (0, 2, 3))
    assert torch.allclose(layer.running_mean, mean - given.stem.bias, atol=1e-12)
    assert torch.allclose(layer.running_var, var, rtol=1e-12)
    assert torch.allclose(layer.weight, (var + 1e-5).sqrt(), rtol=1e-12)
    assert torch.allclose(layer.bias, mean, atol=1e-12)
    assert model.stem.bias is None


def test_in_training_the_function_is_nearly_the_same_at_first():
    given = Residual().double()
    given.eval()
    model, _ = bn.insert(given, "before", IMAGES, preserve=True)
    expected = given(IMAGES)
    for name, module in model.named_modules():
        module.training = name.endswith("_bn")
    assert relative_difference(model(IMAGES), expected) < 1e-2  # the statistics of the batch are biased


def test_the_batches_of_a_loader_are_pooled_by_their_size():
    given = Residual().double()
    whole, _ = bn.insert(given, example=IMAGES, preserve=True)
    batches = [IMAGES[:9], IMAGES[9:10], IMAGES[10:]]
    loaders = {
        "list": batches,
        "with targets": [(x, torch.zeros(len(x))) for x in batches],
        "generator": (x for x in batches),
        "DataLoader": torch.utils.data.DataLoader(torch.utils.data.TensorDataset(IMAGES), batch_size=5),
    }
    for name, loader in loaders.items():
        model, report = bn.insert(given, example=loader, preserve=True)
        assert report.max_difference < 1e-9, name
        for key, values in whole.state_dict().items():
            assert torch.allclose(model.state_dict()[key], values, atol=1e-10), (name, key)


def test_an_example_may_be_arguments_by_position_or_by_name():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc1, self.fc2 = nn.Linear(3, 5), nn.Linear(5, 2)

        def forward(self, x, scale):
            return self.fc2(F.relu(self.fc1(x) * scale))

    given, x, scale = Two(), randn(7, 3), torch.tensor(2.0)
    for example in ((x, scale), {"x": x, "scale": scale}, [{"x": x, "scale": scale}] * 2):
        model, report = bn.insert(given, example=example, preserve=True)
        assert report.max_difference < 1e-5
        assert model.fc1_bn.running_var.min() > 0


@pytest.mark.parametrize("placement", ["before", "after"])
def test_constant_and_dead_channels(placement):
    torch.manual_seed(0)
    given = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2)).double()
    with torch.no_grad():
        given[0].weight[:2] = 0  # constant
        given[0].bias[0], given[0].bias[1] = 5.0, -5.0  # the second one is dead behind the ReLU
    x = randn(10, 4, dtype=torch.float64)
    model, report = bn.insert(given, placement, x, preserve=True)
    assert report.max_difference < 1e-9
    layer = model.get_submodule("0_bn" if placement == "before" else "1_bn")
    assert layer.running_var[:2].tolist() == pytest.approx([0, 0], abs=1e-18)
    assert layer.weight[0].item() == pytest.approx(math.sqrt(1e-5))
    other = randn(10, 4, seed=3, dtype=torch.float64)
    assert relative_difference(model.eval()(other), given(other)) < 1e-9


def test_the_state_of_the_given_model_and_the_random_generators_stay():
    given = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1)
    )
    before = {name: values.clone() for name, values in given.state_dict().items()}
    state = torch.get_rng_state()
    bn.insert(given, example=IMAGES.float(), preserve=True)
    assert torch.equal(torch.get_rng_state(), state)
    assert given.training
    assert all(torch.equal(values, before[name]) for name, values in given.state_dict().items())


def test_options_change_the_statistics_and_never_the_function():
    given = Residual().double()
    for options in ({"eps": 0.1}, {"unbiased": False}, {"momentum": None}, {"eps": 0.0}):
        _, report = bn.insert(given, example=IMAGES, preserve=True, **options)
        assert report.max_difference < 1e-9, options


@pytest.mark.parametrize(
    ("change", "example", "options", "message"),
    [
        (lambda w: w.fill_(math.inf), IMAGES, {}, "the output of stem must be finite"),
        (lambda w: w.zero_(), IMAGES, {"eps": 0.0}, "eps must be positive, since a channel of stem is constant"),
        (lambda w: None, IMAGES[:1], {}, "fc must give at least 2 values per channel on the example; got 1"),
    ],
)
def test_what_cannot_be_undone_is_refused_and_the_model_stays(change, example, options, message):
    given = Residual().double()
    with torch.no_grad():
        change(given.stem.weight)
    before = str(given)
    with pytest.raises(InputError, match=message):
        bn.insert(given, example=example, preserve=True, inplace=True, **options)
    assert str(given) == before
    assert given.stem.bias is not None


def test_a_layer_that_the_example_does_not_reach_is_left_alone():
    class Optional(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc1, self.fc2, self.other, self.head = (nn.Linear(3, 3) for _ in range(4))

        def forward(self, x, y=None):
            x = self.fc2(F.relu(self.fc1(x)))
            return x if y is None else x + self.head(F.relu(self.other(y)))

    model, report = bn.insert(Optional(), example=randn(5, 3), preserve=True)
    assert [layer.path for layer in report.layers] == ["fc1"]
    assert {left.path for left in report.left} == {"fc2", "other", "head"}
    assert model(randn(5, 3)).shape == (5, 3)


def test_a_network_trains_on_from_where_it_was():
    torch.manual_seed(0)
    x = randn(256, 8)
    y = (x[:, :4].sum(1) > 0).long()
    given = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 2))

    def train(model):
        optimizer, losses = torch.optim.SGD(model.parameters(), lr=0.1), []
        for _ in range(100):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses

    first = train(given)
    model, _ = bn.insert(given, example=x, preserve=True)
    further = train(model.train())
    assert further[0] == pytest.approx(first[-1], rel=0.05)
    assert further[-1] < further[0] < first[0]
