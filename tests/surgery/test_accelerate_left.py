"""Code that a trace of a forward does not show: layers are left alone, or the new forward refuses the call."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import batchnorm as bn
from steps_of_models import assert_same_training
from support import randn

X = (4, 4, 5, 5)


def no_grad_elsewhere(x):
    with torch.no_grad():
        return 2 * x


class Part(nn.Module):
    scale = 1

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.act = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.SiLU()
        self.flag = False

    def forward(self, x):
        return self.act(self.norm(self.conv(x)))


class Optional(Part):
    def forward(self, x, skip=None):
        y = self.norm(self.conv(x))
        if skip is not None:
            y = y + skip
        return self.act(y)


class Flagged(Part):
    def forward(self, x):
        y = self.norm(self.conv(x))
        if self.flag:
            y = y + x
        return self.act(y)


class Scaled(Part):
    def forward(self, x):
        return F.silu(self.norm(self.conv(x))) * self.scale


class Dependent(Part):
    def forward(self, x):
        y = self.norm(self.conv(x))
        if x.abs().max() > 100:
            y = y + x
        return self.act(y)


class Sliced(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.Tanh())

    def forward(self, x):
        return self.body[:2](x)


class Tapped(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.SiLU())

    def forward(self, x):
        assert x.shape[1] == 4
        found = []
        for layer in self.body:
            x = layer(x)
            found.append(x)
        return found[1] + found[2]


class Grandchildren(nn.Module):
    def __init__(self):
        super().__init__()
        self.part = Part()

    def forward(self, x):
        assert x.shape[1] == 4
        part = self.part
        return part.act(part.norm(part.conv(x)) + x)


class Whole(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.parts = Part(), nn.ModuleList([Part(), nn.Sequential(*Part().children())])

    def forward(self, x):
        assert x.shape[1] == 4
        x = self.first(x)
        for part in self.parts:
            x = part(x)
        return x


class Methods(Part):
    def before(self, x):
        return self.norm(self.conv(x))

    def forward(self, x):
        return F.silu(self.before(x))


class Direct(Part):
    def forward(self, x):
        return self.act(self.norm(self.conv(x))) + self.act.forward(x + 1)


class ModeOfChild(Part):
    def __init__(self):
        super().__init__()
        self.drop = nn.Dropout()

    def forward(self, x):
        return F.dropout(F.silu(self.norm(self.conv(x))), 0.5, self.drop.training)


class Decorated(Part):
    @torch.no_grad()
    def forward(self, x):
        return F.silu(self.norm(self.conv(x)))


class NoGradElsewhere(Part):
    def forward(self, x):
        return F.silu(self.norm(self.conv(no_grad_elsewhere(x))))


class AsksForGradients(Part):
    def forward(self, x):
        y = F.silu(self.norm(self.conv(x)))
        return y if torch.is_grad_enabled() else 2 * y


class OddNames(Part):
    def forward(this, self):  # noqa: N805
        return F.silu(this.norm(this.conv(self)))


class ByMode(nn.Module):
    def forward(self, x):
        return F.relu(x) if self.training else F.silu(x)


class Twice(nn.ReLU):
    def __call__(self, x):
        return 2 * super().__call__(x)


class OnlyNamedInPlace(nn.Module):
    inplace = True

    def forward(self, x):
        return F.relu(x)


class BothUses(Part):
    def __init__(self):
        super().__init__()
        self.act = OnlyNamedInPlace()

    def forward(self, x):
        y = self.norm(self.conv(x))
        return y + self.act(y)


class Doubled(nn.Module):
    def forward(self, x):
        return x.mul_(2)


class WrittenBetween(Part):
    def __init__(self):
        super().__init__()
        self.pool, self.doubled = nn.MaxPool2d(3, 1, 1), Doubled()

    def forward(self, x):
        h = self.pool(x)
        y = self.norm(h)
        return F.relu(y + self.doubled(h))


class Listed(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.SiLU())

    def forward(self, x):
        found = []
        for layer in self.layers:
            x = layer(x)
            if isinstance(layer, nn.SiLU):
                found.append(x)
        return torch.cat(found)


def with_its_own_forward():
    model = nn.Sequential(nn.BatchNorm2d(4), nn.ReLU())
    model[1].forward = lambda x: 3 * x
    return model


def outputs(model, call, train):
    torch.manual_seed(0)
    return call(model.train(train))


def accelerated(model, **options):
    model = model.double()
    fast, report = bn.accelerate(model, **options)
    return model, fast, [row.after for row in report.layers], report


LEFT = {
    "a value decides": Dependent,
    "slices": Sliced,
    "taps": Tapped,
    "grandchildren": Grandchildren,
    "another method": Methods,
    "the mode of a child": ModeOfChild,
    "a decorator": Decorated,
    "no gradients in a helper": NoGradElsewhere,
    "a question for gradients": AsksForGradients,
    "an argument named self": OddNames,
    "an activation of the mode": lambda: nn.Sequential(nn.BatchNorm2d(4), ByMode()),
    "a call of its own": lambda: nn.Sequential(nn.BatchNorm2d(4), Twice()),
    "a forward of the module": with_its_own_forward,
    "inplace without a meaning": BothUses,
}


@pytest.mark.parametrize("name", LEFT)
def test_layers_are_left_where_other_code_may_decide(name):
    model, fast, after, report = accelerated(LEFT[name]())
    assert after == ["bn.BatchNorm2d"]
    assert report.left[0].reason
    x = randn(*X, dtype=torch.float64)
    for train in (True, False):
        torch.testing.assert_close(*(outputs(each, lambda m: m(x), train) for each in (model, fast)))


def test_what_an_example_did_not_show_is_not_believed():
    x = randn(*X, dtype=torch.float64)
    model, fast, after, _ = accelerated(Dependent(), example=x)
    assert after == ["bn.BatchNorm2d"]
    torch.testing.assert_close(model(1000 * x), fast(1000 * x))


def test_a_later_change_of_the_input_is_left_alone():
    model, fast, after, _ = accelerated(WrittenBetween())
    assert after == ["bn.BatchNorm2d"]
    x = randn(*X, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(*(each.eval()(x.clone()) for each in (model, fast)))


def test_optional_arguments_are_refused_where_an_activation_is_done():
    model, fast, after, _ = accelerated(Optional())
    x = randn(*X, dtype=torch.float64)
    assert after == ["BatchNorm2d + SiLU"]
    torch.testing.assert_close(model(x), fast(x))
    with pytest.raises(bn.UnsupportedError, match="skip"):
        fast(x, x)


@pytest.mark.parametrize(("kind", "name"), [(Flagged, "flag"), (Scaled, "scale")])
def test_changed_attributes_are_refused_those_of_classes_too(kind, name):
    model, fast, after, _ = accelerated(kind())
    x = randn(*X, dtype=torch.float64)
    assert after == ["BatchNorm2d + SiLU"]
    torch.testing.assert_close(model(x), fast(x))
    setattr(fast, name, 3)
    with pytest.raises(bn.UnsupportedError, match=name):
        fast(x)


@pytest.mark.parametrize("kind", [Part, Direct, Listed])
def test_activations_stay_where_code_uses_them_otherwise(kind):
    model, fast, after, _ = accelerated(kind())
    assert after == ["BatchNorm2d + SiLU"]
    assert_same_training(model, fast, randn(*X, dtype=torch.float64))


def test_blocks_that_unread_code_calls_as_a_whole_are_fused():
    model, fast, after, _ = accelerated(Whole())
    assert after == 3 * ["BatchNorm2d + SiLU"]
    assert_same_training(model, fast, randn(*X, dtype=torch.float64))


def test_accelerated_models_can_get_other_normalization():
    class Residual(Part):
        def forward(self, x):
            return F.relu(self.norm(self.conv(x)) + x)

    x = randn(*X, dtype=torch.float64)
    model, fast, after, _ = accelerated(Residual())
    assert after == ["BatchNorm2d + add + ReLU"]
    twin, _ = bn.replace(model, "group")
    torch.testing.assert_close(bn.replace(fast, "group")[0](x), twin(x))


def test_numbers_of_numpy_are_left_to_the_author():
    import numpy as np

    model = Scaled()
    model.scale = np.float64(2)
    model, fast, _, _ = accelerated(model)
    x = randn(*X, dtype=torch.float64)
    torch.testing.assert_close(model(x), fast(x))
