"""Residual branches that begin at zero: which layer ends a branch, and which does not."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

import batchnorm as bn
from support import randn


class DropPath(nn.Module):
    def forward(self, x):
        if not self.training:
            return x
        return x * (torch.rand(x.shape[0], 1, 1, 1) < 0.5)


class Gate(nn.Module):
    """Squeeze-and-excitation."""

    def __init__(self, channels):
        super().__init__()
        self.fc = nn.Conv2d(channels, channels, 1)

    def forward(self, x):
        return x * torch.sigmoid(self.fc(x.mean((2, 3), keepdim=True)))


class Scale(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.gamma = nn.Parameter(torch.full((channels, 1, 1), 0.1))

    def forward(self, x):
        return x * self.gamma


class Block(nn.Module):
    """A block of two convolutions; a subclass says how its branch and its shortcut meet."""

    def __init__(self, norm=nn.BatchNorm2d, channels=4, width=None, **options):
        super().__init__()
        width = width or channels
        self.conv1, self.bn1 = nn.Conv2d(channels, width, 3, padding=1), norm(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, padding=1), norm(width, **options)
        self.relu = nn.ReLU()
        self.shortcut = nn.Identity()
        if width != channels:
            self.shortcut = nn.Sequential(nn.Conv2d(channels, width, 1), norm(width))

    def branch(self, x):
        return self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))

    def forward(self, x):
        return self.relu(self.branch(x) + self.shortcut(x))


class InPlace(Block):
    def forward(self, x):
        out = self.branch(x)
        out += self.shortcut(x)
        return F.relu(out, inplace=True)


class TorchAdd(Block):
    def forward(self, x):
        return torch.add(self.shortcut(x), self.branch(x))


class Behind(Block):
    """A block with modules between the batch normalization and the addition."""

    def __init__(self, *behind):
        super().__init__()
        self.behind = nn.Sequential(*behind)

    def forward(self, x):
        return x + self.behind(self.branch(x))


class Functional(Block):
    def forward(self, x):
        return x + 0.5 * F.dropout(self.branch(x), 0.1, self.training)


class BuiltinSum(Block):
    def forward(self, x):
        return sum([x, self.branch(x) / 2])


class Fused(Block):
    """A block of ours, whose last layer adds the shortcut itself."""

    def __init__(self):
        super().__init__(bn.BatchNorm2d, activation="relu")

    def forward(self, x):
        return self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))), residual=x)


class Sum(Block):
    """Two branches and a shortcut in one sum."""

    def __init__(self):
        super().__init__()
        self.other = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))

    def forward(self, x):
        return x + self.branch(x) + self.other(x)


# Layers that end a branch.


@pytest.mark.parametrize(
    "block",
    [
        Block,
        lambda: Block(bn.BatchNorm2d),
        lambda: Block(nn.SyncBatchNorm),
        lambda: Block(width=8),
        InPlace,
        lambda: InPlace(width=8),
        TorchAdd,
        lambda: TorchAdd(width=8),
        Functional,
        BuiltinSum,
        lambda: Behind(nn.Dropout(0.1)),
        lambda: Behind(DropPath()),
        lambda: Behind(Gate(4), DropPath()),
        lambda: Behind(Scale(4), nn.Identity()),
    ],
    ids=[
        *("add", "ours", "sync", "projection", "in place", "in place projection", "torch.add", "torch.add projection"),
        *("functional", "sum", "dropout", "DropPath", "gate", "scale"),
    ],
)
def test_the_last_layer_of_a_branch_begins_at_zero_and_no_other(block):
    for model, prefix in ((block(), ""), (nn.Sequential(nn.Conv2d(4, 4, 1), block(), nn.Sequential(block())), "1.")):
        names = bn.zero_init_residual(model)
        assert names[0] == f"{prefix}bn2"
        assert len(names) == (2 if prefix else 1)
        zero = {name.removesuffix(".weight") for name, values in model.named_parameters() if not values.any()}
        assert {*names} == {name for name in zero if not name.endswith("bias")}


def test_a_block_returns_its_input_at_first_and_gamma_learns():
    model, x = Behind(Gate(4), nn.Dropout(0.1)), randn(3, 4, 5, 5)
    bn.zero_init_residual(model)
    assert torch.equal(model(x), x)
    model(x).square().sum().backward()
    assert model.bn2.weight.grad.abs().min() > 0


def test_a_layer_of_ours_that_adds_the_residual_itself_begins_at_zero():
    model, x = Fused(), randn(3, 4, 5, 5)
    assert bn.zero_init_residual(model) == ["bn2"]
    assert torch.equal(model(x), x.relu())


def test_all_branches_of_a_sum_begin_at_zero():
    model, x = Sum(), randn(3, 4, 5, 5)
    assert bn.zero_init_residual(model) == ["bn2", "other.1"]
    assert torch.equal(model(x), x)


def test_the_sides_of_the_addition_may_come_from_blocks_around_it():
    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 1))
            self.end = nn.Sequential(nn.Identity(), nn.Sequential(nn.BatchNorm2d(4)))

        def forward(self, x):
            return x + self.end(self.body(x))

    assert bn.zero_init_residual(nn.Sequential(nn.ReLU(), Outer())) == ["1.end.1.0"]


def test_beta_and_statistics_stay_as_they_are():
    model = Block()
    nn.init.ones_(model.bn2.bias)
    model(randn(3, 4, 5, 5))
    before = {name: values.clone() for name, values in model.state_dict().items()}
    bn.zero_init_residual(model)
    assert [name for name, values in model.state_dict().items() if not torch.equal(values, before[name])] == [
        "bn2.weight"
    ]


def test_a_block_that_is_used_twice_is_set_once():
    block = Block()
    assert bn.zero_init_residual(nn.Sequential(block, nn.Conv2d(4, 4, 1), block)) == ["0.bn2"]


def test_an_example_reads_a_forward_that_cannot_be_traced():
    class Untraceable(Block):
        def forward(self, x):
            return self.branch(x) + x if x.sum() > 0 else x + self.branch(x)

    model = nn.Sequential(Untraceable())
    with pytest.raises(bn.InputError, match=r"none that can be read\. 0 cannot be read: .*pass example="):
        bn.zero_init_residual(model)
    assert bn.zero_init_residual(model, randn(2, 4, 5, 5).abs()) == ["0.bn2"]


# Layers that do not.


class Activated(Block):
    def forward(self, x):
        return x + self.relu(self.branch(x))


class ActivatedByItself(Block):
    def __init__(self):
        super().__init__(bn.BatchNorm2d, activation="relu")


class GatedByItself(Block):
    """The layer stands before the addition and its skip."""

    def forward(self, x):
        y = self.bn1(x)
        return y + y * torch.sigmoid(self.conv1(y))


class Convolved(Block):
    def forward(self, x):
        return x + self.conv2(self.branch(x))


class PreActivation(Block):
    def forward(self, x):
        return x + self.conv2(self.relu(self.bn2(self.conv1(self.relu(self.bn1(x))))))


class Parallel(Block):
    """Two branches of the same depth, neither of which is a shortcut."""

    def forward(self, x):
        return self.bn1(self.conv1(x)) + self.bn2(self.conv2(x))


class ElsewhereToo(Block):
    def forward(self, x):
        y = self.branch(x)
        return x + y, y


class SkipConnected(Block):
    """A WaveNet: the output of each branch is also summed up by itself."""

    def forward(self, x):
        first = self.branch(x)
        second = self.bn1(self.conv1(x + first))
        return first + second, x + first + second


class Normalized(Block):
    """No layer with weights is skipped over."""

    def forward(self, x):
        return self.conv1(x + self.bn1(x))


class TwoInputs(Block):
    def forward(self, x, y):
        return y + self.branch(x)


class Concatenated(Block):
    def forward(self, x):
        return torch.cat([x, self.branch(x)], 1)


@pytest.mark.parametrize(
    "block",
    [
        *(Activated, ActivatedByItself, GatedByItself, Convolved, PreActivation),
        *(Parallel, ElsewhereToo, SkipConnected, Normalized, TwoInputs, Concatenated),
    ],
)
def test_a_model_whose_branches_do_not_end_in_batch_normalization_is_an_error(block):
    model = block()
    before = {name: values.clone() for name, values in model.state_dict().items()}
    with pytest.raises(bn.InputError, match=f"whose last layer is batch norm.*; {block.__name__} has none$"):
        bn.zero_init_residual(model)
    assert all(torch.equal(before[name], values) for name, values in model.state_dict().items())


def test_a_layer_that_ends_one_branch_and_is_called_elsewhere_is_left():
    class Twice(Block):
        def forward(self, x):
            return self.bn2(x + self.branch(x))

    with pytest.raises(bn.InputError, match="Twice has none"):
        bn.zero_init_residual(Twice())


def test_a_layer_without_gamma_is_left_and_named():
    model = nn.Sequential(Block(affine=False), Block())
    with pytest.warns(UserWarning, match=r"left layers that end a residual branch: 0\.bn2: it has no gamma"):
        assert bn.zero_init_residual(model) == ["1.bn2"]


def test_a_frozen_and_a_computed_gamma_are_left_and_named():
    frozen, computed = Block(bn.BatchNorm2d), Block()
    bn.freeze(frozen.bn2, affine=True)
    parametrize.register_parametrization(computed.bn2, "weight", nn.Softplus())
    with pytest.warns(UserWarning, match=r"0\.bn2: its gamma is frozen; 1\.bn2: its gamma is computed"):
        assert bn.zero_init_residual(nn.Sequential(frozen, computed)) == []
    assert frozen.bn2.weight.all()


def test_a_block_that_cannot_be_read_is_named_in_a_warning():
    class Untraceable(Block):
        def forward(self, x):
            return x if x.sum() > 0 else x + self.branch(x)

    with pytest.warns(UserWarning, match=r"cannot follow the data\. 1 cannot be read"):
        assert bn.zero_init_residual(nn.Sequential(Block(), Untraceable())) == ["0.bn2"]


def test_a_model_without_batch_normalization_or_of_another_type_is_an_error():
    with pytest.raises(bn.InputError, match="Linear has no normalization layer"):
        bn.zero_init_residual(nn.Linear(2, 2))
    with pytest.raises(bn.InputTypeError, match="got list"):
        bn.zero_init_residual([nn.BatchNorm1d(2)])
