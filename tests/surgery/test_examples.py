"""Runs on an example: what comes out, and that the model is afterwards as before."""

import math

import pytest
import torch
from torch import nn

import batchnorm as bn
from batchnorm.surgery.examples import check_example, check_kept, eval_outputs, largest_difference, run_example
from support import assert_same_state, copied_state, randn


class Several(nn.Module):
    """A model with two arguments, a cache, and nested outputs."""

    def __init__(self):
        super().__init__()
        self.norm, self.drop, self.cache = nn.BatchNorm1d(3), nn.Dropout(0.5), {}

    def forward(self, x, scale=1.0):
        y = self.drop(self.norm(x)) * scale
        self.cache["last"] = y
        self.seen = True
        return {"y": y, "both": (y + 1, [y.argmax(), y * 2])}


@pytest.mark.parametrize(
    "example", [(randn(4, 3), 2.0), {"x": randn(4, 3), "scale": 2.0}], ids=["positional", "keywords"]
)
def test_the_floating_outputs_come_flattened(example):
    y, more, twice = eval_outputs(Several(), example)
    torch.testing.assert_close(y, randn(4, 3) * 2, rtol=1e-4, atol=1e-4)
    assert torch.equal(more, y + 1)
    assert torch.equal(twice, y * 2)


def test_a_run_leaves_statistics_attributes_modes_and_random_state_as_they_were():
    model = Several()
    model.drop.eval()
    before, state = copied_state(model), torch.get_rng_state()
    run_example(model.train(), randn(4, 3) + 5)
    eval_outputs(model, randn(4, 3) + 5)
    assert_same_state(copied_state(model), before)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.cache == {}
    assert not hasattr(model, "seen")
    assert [module.training for module in model.modules()] == [True] * 3


def test_the_present_mode_is_used_and_two_runs_agree():
    model = nn.Sequential(nn.BatchNorm1d(3), nn.Dropout(0.5)).train()
    first, second = (run_example(model, randn(64, 3) * 3 + 5)[0] for _ in range(2))
    assert torch.equal(first, second)
    assert first.mean().abs() < 0.5
    assert (first == 0).any()
    assert not (eval_outputs(model, randn(64, 3))[0] == 0).any()


def test_outputs_have_no_graph():
    assert not run_example(nn.Linear(2, 3), randn(4, 2))[0].requires_grad


@pytest.mark.parametrize("example", [[1.0], "x", None, 3])
def test_an_example_of_another_type_is_a_type_error(example):
    with pytest.raises(bn.InputTypeError, match="a tensor, a tuple of positional arguments, or a mapping"):
        check_example(nn.Linear(2, 3), example)


@pytest.mark.parametrize(
    ("example", "words"),
    [
        (randn(4, 5), r"got shape \(4, 5\) of torch.float32, for which Sequential raised"),
        ((randn(4, 3), 1), r"got \(shape \(4, 3\) of torch.float32, 1\), for which Sequential raised TypeError"),
        ({"z": randn(4, 3)}, r"got z=shape \(4, 3\) of torch.float32"),
    ],
)
def test_a_failing_forward_names_the_example_and_changes_nothing(example, words):
    model = nn.Sequential(nn.BatchNorm1d(3))
    before = copied_state(model)
    with pytest.raises(bn.InputError, match=f"example must be an input that the model takes; {words}"):
        run_example(model, example)
    assert_same_state(copied_state(model), before)


def test_a_lazy_model_must_have_seen_a_batch():
    with pytest.raises(bn.InputError, match=r"got a lazy LazyLinear at 0\. Run the model on a batch first"):
        run_example(nn.Sequential(nn.LazyLinear(3)), randn(4, 2))


@pytest.mark.parametrize(
    ("before", "after", "difference"),
    [
        ([1.0, 2.0], [1.0, 2.5], 0.5),
        ([math.nan, math.inf], [math.nan, math.inf], 0.0),
        ([math.nan], [1.0], math.inf),
        ([math.inf], [-math.inf], math.inf),
        ([1.0], [1.0, 2.0], math.inf),
        ([], [], 0.0),
    ],
)
def test_the_largest_difference(before, after, difference):
    assert largest_difference([torch.tensor(before)], [torch.tensor(after)]) == difference


def test_another_number_of_outputs_is_infinitely_far():
    assert largest_difference([randn(2)], []) == math.inf
    assert largest_difference([], []) == 0.0


def test_an_example_that_the_forward_writes_over_stays_as_it_was():
    example = torch.full((2, 3), -1.0)
    run_example(nn.ReLU(inplace=True), example)
    run_example(nn.ReLU(inplace=True), {"input": example})
    assert torch.equal(example, torch.full((2, 3), -1.0))


def test_outputs_that_differ_by_more_than_rounding_are_an_error():
    before = [torch.tensor([1.0, 8.0, torch.nan]), torch.zeros(2)]
    assert check_kept("fold", before, [before[0] + 0.01, before[1]]) == pytest.approx(0.01, rel=1e-3)
    for after in ([before[0] + 0.1, before[1]], [before[0], before[1] + 1e-9], [before[0], torch.zeros(3)]):
        with pytest.raises(bn.UnsupportedError, match="fold must keep the outputs of the model; on the example they"):
            check_kept("fold", before, after)
