"""Fusing batch norm with the activations and additions that follow it, in blocks written in many ways."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import batchnorm as bn
from steps_of_models import assert_same_training
from support import randn

X = (4, 3, 6, 6)


class Block(nn.Module):
    """Convolutions and batch norms a and b for forwards of every kind, and the modules given."""

    def __init__(self, **modules):
        super().__init__()
        self.conv_a, self.conv_b = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 1, bias=False)
        self.a, self.b = nn.BatchNorm2d(3), nn.BatchNorm2d(3)
        for name, module in modules.items():
            self.add_module(name, module)


def block(forward, **modules):
    """Return a block whose class has this forward."""
    torch.manual_seed(0)
    made = type("Block", (Block,), {"forward": forward})(**modules).double()
    for norm in (made.a, made.b):
        nn.init.uniform_(norm.weight, 0.5, 2.0)
        nn.init.normal_(norm.bias)
    return made


def fused(model, **options):
    """Accelerate a model, check that it trains as before, and return what each layer does now."""
    fast, report = bn.accelerate(model, **options)
    assert_same_training(model, fast, randn(*X, dtype=torch.float64))
    return {
        row.path: row.after.removeprefix("bn.").removeprefix("BatchNorm2d").removeprefix(" + ") for row in report.layers
    }


ACTIVATIONS = {
    "F.relu": lambda self, x: F.relu(x),
    "F.relu in place": lambda self, x: F.relu(x, inplace=True),
    "F.relu_": lambda self, x: F.relu_(x),
    "torch.relu": lambda self, x: torch.relu(x),
    "torch.relu_": lambda self, x: torch.relu_(x),
    "x.relu": lambda self, x: x.relu(),
    "x.relu_": lambda self, x: x.relu_(),
    "module": lambda self, x: self.relu(x),
    "module of one function": lambda self, x: self.own(x),
}


class OwnReLU(nn.Module):
    def forward(self, x):
        return torch.relu(x)


@pytest.mark.parametrize("written", ACTIVATIONS)
def test_a_shared_relu_is_fused_however_it_is_written(written):
    activation = ACTIVATIONS[written]

    def forward(self, x):
        y = activation(self, self.a(self.conv_a(x)))
        return activation(self, self.b(self.conv_b(y)))

    assert fused(block(forward, relu=nn.ReLU(inplace=True), own=OwnReLU())) == {"a": "ReLU", "b": "ReLU"}


def in_place(x, y):
    x += y
    return x


ADDITIONS = {
    "x + y": lambda x, y: x + y,
    "y + x": lambda x, y: y + x,
    "x += y": in_place,
    "torch.add": torch.add,
    "other=": lambda x, y: torch.add(y, other=x),
    "x.add": lambda x, y: x.add(y),
    "x.add_": lambda x, y: x.add_(y),
}


@pytest.mark.parametrize("written", ADDITIONS)
@pytest.mark.parametrize("after", ["add + ReLU", "add"])
def test_an_addition_is_fused_however_it_is_written(written, after):
    add = ADDITIONS[written]

    def forward(self, x):
        y = add(self.b(self.conv_b(F.relu(self.a(self.conv_a(x))))), x)
        return self.relu(y) if after == "add + ReLU" else self.relu6(y)

    assert fused(block(forward, relu=nn.ReLU(), relu6=nn.ReLU6())) == {"a": "ReLU", "b": after}


@pytest.mark.parametrize(
    ("activation", "after"),
    [
        (nn.LeakyReLU(), "LeakyReLU"),
        (nn.LeakyReLU(0.2), ""),
        (nn.SiLU(inplace=True), "SiLU"),
        (nn.GELU(), "GELU"),
        (nn.GELU("tanh"), ""),
        (nn.Tanh(), "Tanh"),
        (nn.Sigmoid(), "Sigmoid"),
        (nn.ReLU6(), ""),
        (nn.Hardswish(), ""),
        (nn.ELU(), ""),
        (nn.PReLU(), ""),
    ],
    ids=str,
)
def test_an_activation_is_fused_where_our_layers_have_it(activation, after):
    model = nn.Sequential(nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3), activation).double()
    assert fused(model) == {"1": after}
    fast, report = bn.accelerate(model)
    assert (type(fast[2]) is nn.Identity) == bool(after)
    assert [row.reason for row in report.left] == (
        [] if after else [f"{type(activation).__name__} follows, which has no fused kernel"]
    )


def calls_twice(self, x):
    return self.relu(self.a(self.relu(self.a(self.conv_a(x)))))


def is_used_twice(self, x):
    y = self.a(self.conv_a(x))
    return F.relu(y) + torch.sigmoid(y)


def writes_over_its_input(self, x):
    y = x * 1
    z = y.view(-1)
    y += self.a(self.conv_a(x))
    return F.relu6(y) + z.view_as(y)


def adds_with_a_factor(self, x):
    return F.relu(torch.add(self.a(self.conv_a(x)), x, alpha=2))


def adds_to_itself(self, x):
    y = self.a(self.conv_a(x))
    return F.relu(y + y)


def keeps_it(self, x):
    self.seen = self.a(self.conv_a(x))
    return F.relu(self.seen)


def depends_on_the_mode(self, x):
    y = self.a(self.conv_a(x))
    return F.relu(y) if self.training else F.relu6(y)


REFUSED = [calls_twice, is_used_twice, writes_over_its_input, adds_with_a_factor]
REFUSED += [adds_to_itself, keeps_it, depends_on_the_mode]


@pytest.mark.parametrize("forward", REFUSED, ids=lambda forward: forward.__name__)
def test_a_layer_is_left_alone_where_something_else_sees_its_output(forward):
    model = block(forward, relu=nn.ReLU())
    del model.b
    assert fused(model) == {"a": ""}
    _, report = bn.accelerate(model)
    assert [row.path for row in report.left] == ["a"]


def test_a_layer_whose_input_is_overwritten_before_the_addition_is_left_alone():
    def forward(self, x):
        y = x * 1
        z = self.a(y)
        y.mul_(2)
        return F.relu(z + y)

    model, x = block(forward).eval(), randn(*X, dtype=torch.float64)
    fast, report = bn.accelerate(model)
    with torch.no_grad():
        torch.testing.assert_close(fast(x), model(x))
    assert "its input may be changed in place before the addition" in {row.reason for row in report.left}


def test_statements_in_place_change_what_follows_them():
    def forward(self, x):
        y = self.a(self.conv_a(x))
        y.add_(x)
        self.relu(y)
        return self.conv_b(y) + y

    assert fused(block(forward, relu=nn.ReLU(inplace=True)))["a"] == "add + ReLU"


def test_one_of_two_layers_that_are_added_takes_the_addition():
    def forward(self, x):
        y = self.b(self.conv_b(x))
        y += self.a(self.conv_a(x))
        return self.relu(y)

    assert sorted(fused(block(forward, relu=nn.ReLU())).values()) == ["", "add + ReLU"]


@pytest.mark.parametrize("size", [(3, 1, 1), (1, 1, 6, 6), (2, 4, 3, 6, 6)], ids=str)
def test_an_addition_that_broadcasts_is_done_as_before(size):
    def forward(self, x):
        return self.relu(self.a(self.conv_a(x)) + self.other)

    model = block(forward, relu=nn.ReLU())
    model.register_parameter("other", nn.Parameter(randn(*size, dtype=torch.float64)))
    fused(model)


def test_an_addition_of_another_dtype_is_done_as_before():
    model = block(lambda self, x: torch.relu(self.a(self.conv_a(x)) + self.other)).float()
    model.register_buffer("other", randn(*X, dtype=torch.float64))
    fast, _ = bn.accelerate(model)
    x = randn(*X)
    torch.testing.assert_close(fast(x), model(x), rtol=0, atol=1e-6)  # values up to 4, four roundings
    assert fast(x).dtype == torch.float64


def test_a_layer_in_a_container_takes_the_addition_of_the_block_around():
    def forward(self, x):
        return self.relu(self.inner(x) + x)

    inner = nn.Sequential(nn.Conv2d(3, 3, 1), nn.Sequential(nn.BatchNorm2d(3), nn.Identity()))
    model = block(forward, inner=inner, relu=nn.ReLU())
    del model.a, model.b
    names = [name for name, _ in model.named_modules()]
    fast, _ = bn.accelerate(model)
    assert fused(model) == {"inner.1.0": "add + ReLU"}
    assert [name for name, _ in fast.named_modules()] == names


@pytest.mark.parametrize("hooked", ["a", "relu", "inner"])
def test_hooks_see_what_they_saw(hooked):
    def forward(self, x):
        return self.relu(self.inner(self.a(self.conv_a(x))) + x)

    model = block(forward, relu=nn.ReLU(), inner=nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)))
    del model.b
    seen = []
    model.get_submodule(hooked).register_forward_hook(lambda module, args, y: seen.append((args[0].clone(), y.clone())))
    fast, _ = bn.accelerate(model)
    x = randn(*X, dtype=torch.float64)
    model(x)
    fast(x)
    torch.testing.assert_close(seen[1], seen[0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("training", [True, False])
def test_narrow_dtypes_differ_by_rounding(dtype, training):
    def forward(self, x):
        return F.relu(self.b(self.conv_b(F.relu(self.a(self.conv_a(x))))) + x)

    model = block(forward).to(dtype).train(training)
    fast, report = bn.accelerate(model)
    x = randn(*X).to(dtype)
    found, expected = fast(x), copy.deepcopy(model).double()(x.double())
    assert found.dtype == dtype
    assert {row.after for row in report.layers} == {"BatchNorm2d + ReLU", "BatchNorm2d + add + ReLU"}
    # outputs are at most 16, and pass five rounded operations
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=5 * 16 * torch.finfo(dtype).eps)


def test_inplace_keeps_the_parameters_and_an_optimizer_goes_on():
    def forward(self, x):
        return F.relu(self.b(self.conv_b(F.relu(self.a(self.conv_a(x))))) + x)

    model, x = block(forward), randn(*X, dtype=torch.float64)
    twin = copy.deepcopy(model)
    parameters = dict(model.named_parameters())
    optimizers = [torch.optim.Adam(each.parameters(), 0.01) for each in (model, twin)]
    losses = []
    for step in range(20):
        for each, optimizer in zip((model, twin), optimizers, strict=True):
            optimizer.zero_grad()
            loss = (each(x) - 1).square().mean()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        if step == 4:
            same, _ = bn.accelerate(model, inplace=True)
            assert same is model
    assert all(parameter is parameters[name] for name, parameter in model.named_parameters())
    assert losses[-1] < losses[0]
    torch.testing.assert_close(losses[::2], losses[1::2], rtol=1e-9, atol=0)


def test_the_model_given_stays_as_it_is():
    model = block(lambda self, x: F.relu(self.a(self.conv_a(x)) + self.b(x)))
    shown, kind, state = repr(model), type(model), copy.deepcopy(model.state_dict())
    bn.accelerate(model, example=randn(*X, dtype=torch.float64))
    assert repr(model) == shown
    assert type(model) is kind
    torch.testing.assert_close(dict(model.state_dict()), dict(state), rtol=0, atol=0)


def test_accelerating_twice_changes_nothing_more():
    model = block(lambda self, x: F.relu(self.b(self.conv_b(F.relu(self.a(self.conv_a(x))))) + x))
    once, _ = bn.accelerate(model)
    twice, report = bn.accelerate(once)
    assert report.layers == ()
    assert_same_training(once, twice, randn(*X, dtype=torch.float64))


def test_a_code_that_torch_fx_cannot_trace_is_read_on_the_example():
    def forward(self, x):
        if x.sum() > 1e9:
            return x
        return self.relu(self.a(self.conv_a(x)))

    model, x = block(forward, relu=nn.ReLU()), randn(*X, dtype=torch.float64)
    del model.b
    assert fused(model) == {"a": ""}
    assert fused(model, example=x) == {"a": "ReLU"}


def test_the_report_has_the_largest_difference_on_the_example():
    model = block(lambda self, x: F.relu(self.a(self.conv_a(x)) + self.b(x))).float()
    _, report = bn.accelerate(model, example=randn(*X))
    assert report.max_difference < 1e-5
    assert bn.accelerate(model)[1].max_difference is None


def test_a_model_without_batch_norm_is_refused():
    with pytest.raises(bn.InputError, match="accelerate needs a model with batch normalization"):
        bn.accelerate(nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2)))


def test_an_example_of_the_wrong_shape_leaves_the_model_as_it_is():
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU())
    with pytest.raises(bn.InputError, match="example must be an input that the model takes"):
        bn.accelerate(model, example=randn(2, 5), inplace=True)
    assert type(model[1]) is nn.BatchNorm2d
