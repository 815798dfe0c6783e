"""`tune`: the batch norms that it does not fold, each with its reason, and results that are right all the same."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, prune

import batchnorm as bn
from batchnorm.surgery.tuning.tuned_pairs import is_tuned
from support import randn


class Model(nn.Module):
    """A convolution and a batch norm of 4 channels, and what a subclass does with them."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv1d(4, 4, 3, padding=1), nn.BatchNorm1d(4)

    def forward(self, x):
        """Return (N, 4, L) for (N, 4, L)."""
        return self.norm(self.conv(x))


class ActivationBetween(Model):
    def forward(self, x):
        return self.norm(F.relu(self.conv(x)))


class NormFirst(Model):
    def forward(self, x):
        return self.conv(self.norm(x))


class TwoUses(Model):
    def forward(self, x):
        z = self.conv(x)
        return self.norm(z) + z


class ConvTwice(Model):
    def forward(self, x):
        return self.norm(self.conv(self.conv(x)))


class NormTwice(Model):
    def forward(self, x):
        return self.norm(self.norm(self.conv(x)))


class SharedNorm(Model):
    def __init__(self):
        super().__init__()
        self.other = nn.Conv1d(4, 4, 1)

    def forward(self, x):
        return self.norm(self.conv(x)) + self.norm(self.other(x))


class Kept(Model):
    def forward(self, x):
        self.features = self.conv(x)
        return self.norm(self.features)


class Returned(Model):
    def forward(self, x):
        z = self.conv(x)
        return self.norm(z), z


class ByMode(Model):
    def forward(self, x):
        return self.norm(self.conv(x)) if self.training else self.conv(self.norm(x))


class ByValue(Model):
    def forward(self, x):
        return self.norm(self.conv(x)) if x.sum() > 1e9 else self.conv(x)


class Unused(Model):
    def forward(self, x):
        return self.conv(x)


class Standardized(nn.Conv1d):
    """A convolution whose scale is lost."""

    def forward(self, x):
        weight = self.weight / self.weight.std()
        return F.conv1d(x, weight, self.bias, padding=1)


class ByMethod(nn.Conv1d):
    """A convolution whose forward reads its weight where no other one can be given."""

    def convolve(self, x):
        return F.conv1d(x, self.weight, self.bias, padding=1)

    def forward(self, x):
        return self.convolve(x)


class Random(nn.Conv1d):
    def forward(self, x):
        return super().forward(F.dropout(x, training=self.training))


def with_(change, kind=Model):
    """Return a model after a change."""
    model = kind()
    change(model)
    return model


def hook(module, *arguments):
    return None


def set_conv(conv):
    return lambda model: setattr(model, "conv", conv)


@torch.no_grad()
def pruned(model):
    """Prune the convolution; torch cannot copy it until a forward without gradients."""
    prune.l1_unstructured(model.conv, "weight", 2)
    model.conv(randn(1, 4, 3))


LEFT = {
    "activation between": (ActivationBetween, "it takes the output of relu"),
    "norm first": (NormFirst, "its input is the input of the model"),
    "two uses": (TwoUses, "the Conv1d before it has another use: add"),
    "conv twice": (ConvTwice, "the Conv1d before it is called 2 times"),
    "norm twice": (NormTwice, "it is called 2 times"),
    "shared norm": (SharedNorm, "it is called 2 times"),
    "kept": (Kept, "the Conv1d before it may have another use: the forward of Kept keeps it as an attribute"),
    "returned": (Returned, "the Conv1d before it has another use: output"),
    "by mode": (ByMode, "computes otherwise in training than in eval"),
    "by value": (ByValue, "torch.fx cannot trace ByValue"),
    "unused": (Unused, "no forward calls norm"),
    "hook on conv": (
        lambda: with_(lambda m: m.conv.register_forward_hook(hook)),
        "the Conv1d before it has hooks, which see its output",
    ),
    "hook on norm": (
        lambda: with_(lambda m: m.norm.register_forward_pre_hook(hook)),
        "there are hooks on it, which see its input",
    ),
    "backward hook": (
        lambda: with_(lambda m: m.norm.register_full_backward_hook(hook)),
        "there are hooks on it, which see its input",
    ),
    "pruned": (lambda: with_(pruned), "computed before each forward, by pruning"),
    "parametrized": (
        lambda: with_(lambda m: parametrizations.weight_norm(m.conv)),
        "the weight or bias of ParametrizedConv1d is parametrized",
    ),
    "standardized": (
        lambda: with_(set_conv(Standardized(4, 4, 3))),
        "the Standardized before it has a forward of its own",
    ),
    "by method": (lambda: with_(set_conv(ByMethod(4, 4, 3))), "the ByMethod before it has a forward of its own"),
    "random": (lambda: with_(set_conv(Random(4, 4, 1))), "the Random before it has a forward of its own"),
    "assigned forward": (
        lambda: with_(lambda m: setattr(m.conv, "forward", m.conv.forward)),
        "the forward of Conv1d was replaced by an assignment",
    ),
}


@pytest.mark.parametrize("case", LEFT)
def test_a_batch_norm_that_cannot_be_folded_is_frozen_with_the_reason(case):
    make, reason = LEFT[case]
    torch.manual_seed(0)
    stock = make()
    model, report = bn.tune(stock)
    assert report.layers == ()
    (left,) = report.left
    assert left.path == "norm"
    assert left.kind == "BatchNorm1d"
    assert left.reason.startswith("frozen, but not folded: ")
    assert reason in left.reason
    assert not any(is_tuned(module) for module in model.modules())
    assert type(model.norm) is bn.BatchNorm1d
    assert model.norm.frozen_statistics


COMPUTED = [case for case in LEFT if case not in ("by mode", "random")]


@pytest.mark.parametrize("case", COMPUTED)
@torch.no_grad()
def test_what_is_left_computes_the_same_in_training_as_in_eval_before(case):
    torch.manual_seed(0)
    stock = LEFT[case][0]().eval()
    x = randn(3, 4, 6)
    stock.train()(x)  # statistics other than those of a new layer
    expected = stock.eval()(x)
    found = bn.tune(stock)[0].train()(x)
    # Our layers and torch's round the normalization in float32 to 6e-8 of values up to 4.
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def test_a_layer_without_running_statistics_stays_as_it_is_and_is_named():
    stock = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4, track_running_stats=False))
    model, report = bn.tune(stock)
    (left,) = report.left
    assert left.reason == "not frozen: it keeps no running statistics, and normalizes with those of each batch"
    x = randn(5, 4)
    torch.testing.assert_close(model(x), stock(x))


# Layers in several places.


class Head(nn.Module):
    """A block that is run at several sizes, as the heads of detectors are."""

    def __init__(self):
        super().__init__()
        self.block = Model()

    def forward(self, x):
        return self.block(x).sum() + self.block(x[..., ::2]).sum()


def test_a_pair_in_a_block_that_is_called_twice_is_folded():
    torch.manual_seed(0)
    stock = Head().eval()
    model, report = bn.tune(stock)
    assert len(report.layers) == 1
    x = randn(3, 4, 6)
    torch.testing.assert_close(model.train()(x), stock(x))


class Borrowing(nn.Module):
    """Has the convolution of a block as a child too, and calls it where torch.fx cannot look."""

    def __init__(self):
        super().__init__()
        self.block = Model()
        self.borrowed = self.block.conv

    def forward(self, x):
        z = self.block(x)
        return z + self.borrowed(x) if z.sum() > -1e9 else z


@pytest.mark.parametrize("example", [None, randn(3, 4, 6)], ids=["no example", "example"])
def test_a_convolution_that_an_unread_block_holds_too_is_not_folded(example):
    torch.manual_seed(0)
    stock = Borrowing().eval()
    model, report = bn.tune(stock, example)
    assert report.layers == ()
    x = randn(3, 4, 6)
    torch.testing.assert_close(model.train()(x), stock(x))


def test_a_layer_of_the_same_weight_keeps_it():
    stock = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4)).eval()
    stock[2].weight = stock[0].weight
    model, report = bn.tune(stock)
    assert len(report.layers) == 1
    assert model[2].weight is model[0].weight
    x = randn(5, 4)
    torch.testing.assert_close(model(x), stock(x))
    model(x).square().sum().backward()
    stock(x).square().sum().backward()
    torch.testing.assert_close(model[0].weight.grad, stock[0].weight.grad)


# Forwards that are not torch's, and blocks that are read on an example.


class Padded(nn.Conv2d):
    """A convolution that pads by the size of its input, as those of TensorFlow's networks do."""

    def forward(self, x):
        size = (x.shape[-1] - 1) // self.stride[0] * self.stride[0] + self.kernel_size[0] - x.shape[-1]
        x = F.pad(x, [size // 2, size - size // 2] * 2)
        return F.conv2d(x, self.weight, self.bias, self.stride, 0, self.dilation, self.groups)


def test_a_convolution_with_a_forward_of_its_own_is_folded_if_it_is_linear_in_its_weight():
    torch.manual_seed(0)
    stock = nn.Sequential(Padded(3, 4, 3, stride=2), nn.BatchNorm2d(4)).eval()
    model, report = bn.tune(stock)
    assert len(report.layers) == 1
    assert type(model[0]).__name__ == "Padded"
    x = randn(2, 3, 7, 7)
    torch.testing.assert_close(model(x), stock(x))


def test_the_output_may_cross_the_borders_of_blocks_and_identities():
    torch.manual_seed(0)
    inner = nn.Sequential(nn.Identity(), nn.Sequential(nn.Conv1d(4, 4, 3)), nn.Identity())
    stock = nn.Sequential(inner, nn.Sequential(nn.Identity(), nn.BatchNorm1d(4))).eval()
    model, report = bn.tune(stock)
    assert [layer.path for layer in report.layers] == ["1.1"]
    x = randn(2, 4, 6)
    torch.testing.assert_close(model(x), stock(x))


class Chosen(nn.Module):
    """Chooses by the values of its input, so that it is read on an example alone."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.block = nn.Conv1d(4, 4, 3), nn.BatchNorm1d(4), Model()

    def forward(self, x):
        z = self.norm(self.conv(x))
        return self.block(z) if z.sum() > -1e9 else z


def test_the_blocks_that_can_be_read_are_folded_and_the_others_need_an_example():
    torch.manual_seed(0)
    stock, x = Chosen().eval(), randn(2, 4, 6)
    model, report = bn.tune(stock)
    assert [layer.path for layer in report.layers] == ["block.norm"]
    assert [left.path for left in report.left] == ["norm"]
    assert report.max_difference is None
    torch.testing.assert_close(model(x), stock(x))
    model, report = bn.tune(stock, x)
    assert [layer.path for layer in report.layers] == ["norm", "block.norm"]
    assert report.max_difference < 1e-6
    torch.testing.assert_close(model(x), stock(x))
