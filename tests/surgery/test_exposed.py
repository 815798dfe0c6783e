"""`fold`, `tune` and `insert` where other code reads a layer, calls it, or writes into what it takes."""

import copy
import inspect

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F

import batchnorm as bn
from batchnorm.errors import UnsupportedError
from batchnorm.surgery.examples import eval_outputs, largest_difference
from batchnorm.surgery.report import Left
from support import assert_same_state, copied_state, randn

IMAGE = (2, 4, 9, 9)


def settled(model):
    """Return a float64 model in eval mode whose parameters and statistics are random."""
    model = model.double().eval()
    for i, values in enumerate((*model.parameters(), *model.buffers())):
        if values.is_floating_point():
            values.data.copy_(randn(*values.shape, seed=i).abs() + 0.1)
    return model


def kept_by(operation, model, *, example=False):
    """Operate on a copy of a model, check that the outputs stay, and return the report."""
    x = randn(*IMAGE, dtype=torch.float64)
    made, report = operation(model, x) if example else operation(model)
    assert largest_difference(eval_outputs(model, x.clone()), eval_outputs(made, x.clone())) < 1e-9
    return report


class Pair(nn.Module):
    """A convolution and a batch norm; subclasses say what else reads or calls them."""

    def __init__(self, **options):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(4, 4, 3, **options), nn.BatchNorm2d(4)

    def forward(self, x):
        return self.norm(self.conv(x))


class Around(nn.Module):
    """A pair within another module."""

    def __init__(self, inner=None):
        super().__init__()
        self.net = Pair() if inner is None else inner

    def forward(self, x):
        return self.net(x)


class AllParameters(Around):
    def forward(self, x):
        return self.net(x), sum(p.pow(2).sum() for p in self.parameters())


class NamedParameters(Around):
    def forward(self, x):
        return self.penalty(self.net(x))

    def penalty(self, y):
        return y + sum(p.pow(2).sum() for _, p in self.net.named_parameters())


class StateDict(Around):
    def forward(self, x):
        return self.net(x), len(self.state_dict())


class Doubled(Around):
    def forward(self, x):
        return functional_call(self.net, {name: 2 * p for name, p in self.net.named_parameters()}, (x,))


class Inherits(AllParameters):
    def forward(self, x):
        return super().forward(x)


class OwnTable(Pair):
    def forward(self, x):
        return super().forward(x), self.conv._parameters["weight"].sum()


@pytest.mark.parametrize("kind", [AllParameters, NamedParameters, StateDict, Doubled, Inherits, OwnTable])
@pytest.mark.parametrize("example", [False, True])
def test_layers_whose_parameters_a_forward_around_lists_are_not_folded(kind, example):
    report = kept_by(bn.fold, settled(kind()), example=example)
    assert report.layers == ()


class ForItsKind(Around):
    def forward(self, x):
        """Convert x to the kind of the parameters."""
        assert "x" in inspect.signature(self.net.forward).parameters
        return self.net(x.to(next(self.parameters()).dtype).to(next(self.net.parameters()).device))


def test_a_forward_that_reads_a_dtype_off_its_parameters_is_folded():
    assert len(kept_by(bn.fold, settled(ForItsKind())).layers) == 1


class AsksForBias(Pair):
    def forward(self, x):
        y = super().forward(x)
        return y if self.conv.bias is None else 2 * y


class AsksFromAround(Around):
    def forward(self, x):
        return self.net(x) if self.net.conv.bias is None else 2 * self.net(x)


def test_a_layer_that_is_asked_whether_it_has_a_bias_gets_none():
    for model in (AsksForBias(bias=False), AsksFromAround(Pair(bias=False))):
        (left,) = kept_by(bn.fold, settled(model)).left
        assert "asks for a bias" in left.reason
    assert len(kept_by(bn.fold, settled(AsksForBias())).layers) == 1


class UnreadAround(Around):
    def forward(self, x):
        return x if x.sum() > 1e9 else self.net(x) + self.net.conv.weight.sum()


class UnreadCaller(Around):
    def forward(self, x):
        return x if x.sum() > 1e9 else (self.net(x), self.net.conv(x))


class PartsOfSequential(Around):
    def __init__(self):
        super().__init__(nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.ReLU()))

    def forward(self, x):
        return self.net[:1](x), self.net(x)


def test_a_forward_that_cannot_be_read_and_reads_weights_hinders_folding():
    (left,) = kept_by(bn.fold, settled(UnreadAround())).left
    assert left.reason == "the forward of UnreadAround cannot be read, and uses weight"


@pytest.mark.parametrize("kind", [UnreadCaller, PartsOfSequential])
@pytest.mark.parametrize("operation", [bn.fold, bn.tune])
def test_parts_that_a_forward_that_cannot_be_read_may_call_are_left(operation, kind):
    report = kept_by(operation, settled(kind()))
    assert report.layers == ()
    assert f"{kind.__name__} cannot be read" in report.left[0].reason


class Statistics(Around):
    def __init__(self):
        super().__init__(nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)))

    def forward(self, x):
        return self.net(x) - self.net[1].running_mean.sum()


def test_a_batch_norm_whose_statistics_a_forward_further_out_reads_is_left():
    (left,) = kept_by(bn.fold, settled(Statistics())).left
    assert left.reason == "the forward of Statistics reads running statistics"


class Scaled(nn.Conv2d):
    def forward(self, x, scale=1.0):
        return super().forward(x) * scale


class SwitchesAtSize(nn.Conv2d):
    def forward(self, x):
        y = super().forward(x)
        return y if x.shape[-1] <= 8 else y.relu()


class CallsScaled(Pair):
    def __init__(self):
        super().__init__()
        self.conv = Scaled(4, 4, 3)

    def forward(self, x):
        return self.norm(self.conv(x, scale=3.0))


@pytest.mark.parametrize("operation", [bn.fold, bn.tune])
def test_a_layer_that_computes_otherwise_in_this_call_is_left(operation):
    (left,) = kept_by(operation, settled(CallsScaled())).left
    assert "Scaled, which has a forward of its own, is called with scale too" in left.reason
    (left,) = kept_by(operation, settled(nn.Sequential(SwitchesAtSize(4, 4, 3), nn.BatchNorm2d(4)))).left
    assert "forward" in left.reason


class OwnResidual(Pair):
    def __init__(self):
        super().__init__()
        self.norm = bn.BatchNorm2d(4)

    def forward(self, x):
        y = self.conv(x)
        return self.norm(y, residual=y)


def test_a_batch_norm_that_adds_its_own_input_is_not_folded_into_the_layer():
    (left,) = kept_by(bn.tune, settled(OwnResidual())).left
    assert "the Conv2d before it is its residual too" in left.reason
    assert kept_by(bn.fold, settled(OwnResidual())).layers == ()


# What is written in place.


class WritesLater(nn.Module):
    """A batch norm that becomes part of the next layer, and other code that writes into its input before that runs."""

    def __init__(self, write):
        super().__init__()
        self.first, self.norm, self.conv = nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3)
        self.write = write

    def forward(self, x):
        y = self.first(x).sigmoid()
        h = self.norm(y)
        r = self.write(y)
        return self.conv(h).mean() + r


class WritesIntoInput(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.conv = nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3)

    def forward(self, x):
        h = self.norm(x)
        x.mul_(2)
        return self.conv(h)


WRITERS = {
    "module": nn.ReLU(inplace=True),
    "function": F.relu_,
    "method": lambda y: y.mul_(2),
    "view": lambda y: y.view(-1).mul_(3).sum(),
}


@pytest.mark.parametrize("write", WRITERS)
def test_what_is_folded_into_the_next_layer_keeps_its_input(write):
    model = WritesLater(WRITERS[write] if write != "module" else nn.Threshold(0.6, 5.0, inplace=True))
    model.first.bias.data.fill_(0)
    assert len(kept_by(bn.fold, settled(model)).layers) == 1
    assert len(kept_by(bn.fold, settled(WritesIntoInput())).layers) == 1


def test_nothing_is_copied_where_no_other_code_has_the_input():
    for model in (nn.Sequential(nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3)), nn.Sequential(nn.ReLU(), nn.BatchNorm2d(4))):
        model.append(nn.Conv2d(4, 4, 1))
        folded, report = bn.fold(settled(model))
        assert len(report.layers) == 1
        assert not folded[[*model].index(next(m for m in model if isinstance(m, nn.BatchNorm2d)))].copies


# Outputs that are not kept.


OF_TORCH = "_parameters"


class Untold(nn.Module):
    """Reads a weight by a way that no graph and no name shows."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x):
        parameters = vars(self.conv)[OF_TORCH]
        return self.norm(self.conv(x)) * float(parameters["weight"].detach().sum())


@pytest.mark.parametrize("inplace", [False, True])
def test_outputs_that_are_not_kept_on_the_example_are_an_error(inplace):
    model, x = settled(Untold()), randn(*IMAGE, dtype=torch.float64)
    before = copied_state(model)
    with pytest.raises(UnsupportedError, match="fold must keep the outputs of the model; on the example they differ"):
        bn.fold(model, x, inplace=inplace)
    assert_same_state(copied_state(model), before)
    assert type(model.norm) is nn.BatchNorm2d


# Insertion.


class Bare(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.o = nn.Linear(4, 8), nn.Linear(8, 2)

    def forward(self, x):
        return self.o(F.relu(self.a(x)))


class BareListed(Bare):
    def forward(self, x):
        return super().forward(x), sum(p.sum() for p in self.parameters())


class BareBias(Bare):
    def forward(self, x):
        return super().forward(x), self.a.bias.pow(2).sum()


@pytest.mark.parametrize("placement", ["before", "after"])
def test_no_layer_comes_where_the_forward_lists_all_parameters(placement):
    report = bn.insert(BareListed(), placement)[1]
    assert report.layers == ()
    assert "the forward of BareListed uses parameters" in [left.reason for left in report.left]


def test_a_bias_that_the_forward_reads_or_a_hook_follows_stays():
    hooked, x = Bare(), randn(16, 4)
    hooked.a.register_forward_hook(lambda module, args, output: output * 2)
    for model in (BareBias(), hooked):
        made, report = bn.insert(copy.deepcopy(model), example=x, preserve=True)
        assert made.a.bias is not None
        assert report.max_difference < 1e-5


class SumOfTwo(nn.Module):
    def __init__(self):
        super().__init__()
        self.w, self.u, self.o = nn.Linear(4, 8), nn.Linear(4, 8), nn.Linear(8, 2)

    def forward(self, x):
        return self.o(torch.tanh(self.w(x) + self.u(x)))


def test_one_layer_behind_the_sum_of_two_is_listed_once():
    report = bn.insert(SumOfTwo(), "after")[1]
    assert [layer.path for layer in report.layers] == ["w"]
    assert report.left[0] == Left("u", "Linear", "w_bn normalizes its output too")


def test_an_identity_takes_the_place_of_channels_in_any_dimension():
    model, report = bn.replace(nn.Sequential(bn.BatchNorm1d(3, channel_dim=-1)), "identity")
    assert isinstance(model[0], nn.Identity)
    assert report.left == ()


def test_an_insertion_that_changes_nothing_speaks_of_no_new_parameters():
    assert bn.insert(BareListed())[1].notes == ()
