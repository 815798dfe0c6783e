"""A layer with a bug is found, whichever of its results the bug is in."""

import pytest
import torch
from torch import nn

import batchnorm as bn
from batchnorm.lab.bench import sides
from batchnorm.lab.bench.check import find_fault
from batchnorm.lab.bench.registry import CASES, Case

SMALL = [case for case in CASES if case.bytes < 2e5]


class UnbiasedVariance(bn.BatchNorm2d):
    def forward(self, x, residual=None):
        count = x.numel() // x.shape[1]
        return super().forward(x, residual) * ((count - 1) / count) ** 0.5


class ResidualOff(bn.BatchNorm2d):
    def forward(self, x, residual=None):
        return super().forward(x, residual * 1.0001)


class ConstantMoments(bn.BatchNorm2d):
    def forward(self, x, residual=None):
        mean, var = x.mean((0, 2, 3)).detach(), x.var((0, 2, 3), correction=0).detach()
        super().forward(x, residual)
        self.eval()
        z = nn.functional.batch_norm(x, mean, var, self.weight, self.bias, False, 0.0, self.eps)
        return torch.relu(z if residual is None else z + residual)


class NoRunningStatistics(bn.BatchNorm2d):
    def forward(self, x, residual=None):
        kept = self.running_var.clone()
        y = super().forward(x, residual)
        self.running_var.copy_(kept)
        return y


class Contiguous(bn.BatchNorm2d):
    def forward(self, x, residual=None):
        return super().forward(x, residual).contiguous()


class NotANumber(bn.BatchNorm2d):
    def forward(self, x, residual=None):
        y = super().forward(x, residual).clone()
        y.view(-1)[3] = torch.nan
        return y


def found(case, layer, monkeypatch):
    monkeypatch.setitem(sides.OURS, 4, layer)
    given = sides.inputs(case)
    return find_fault(case, given, sides.ours(case, given))


@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
def test_the_small_cases_are_right(case):
    given = sides.inputs(case)
    assert find_fault(case, given, sides.ours(case, given)) is None


@pytest.mark.parametrize(
    ("layer", "operation", "mode", "sentence"),
    [
        (UnbiasedVariance, "bn", "forward", "y is "),
        (UnbiasedVariance, "bn+relu", "train", "y is "),
        (ResidualOff, "bn+add+relu", "train", "y is "),
        (ConstantMoments, "bn+relu", "train", "dx is "),
        (NoRunningStatistics, "bn", "forward", "running_var is "),
        (NotANumber, "bn", "eval", "y is nan off"),
    ],
)
def test_a_layer_with_a_bug_is_found_by_the_result_that_is_wrong(layer, operation, mode, sentence, monkeypatch):
    case = Case(operation, mode, "float32", (5, 123, 7, 11))
    assert found(case, layer, monkeypatch).startswith(sentence)


def test_a_result_in_another_layout_is_found(monkeypatch):
    case = Case("bn", "eval", "float32", (5, 123, 7, 11), "channels_last")
    assert found(case, Contiguous, monkeypatch) == "y is not channels_last"


def test_stock_layers_are_right_where_they_round_once():
    case = Case("bn+relu", "train", "float32", (5, 123, 7, 11), "channels_last")
    given = sides.inputs(case)
    assert find_fault(case, given, sides.stock(case, given)) is None
