"""Training in stacks: the numbers of a run do not depend on the other runs of its stack."""

import math
from dataclasses import replace

import numpy as np
import polars as pl
import pytest
import torch

from batchnorm.lab.data.dataset import prepare
from batchnorm.lab.data.tables import Table
from batchnorm.lab.training.runs import Target
from batchnorm.lab.training.settings import ARMS, PLACEMENTS, Settings
from batchnorm.lab.training.stacks import Stack
from batchnorm.lab.training.train import seconds_per_step, train
from batchnorm.lab.training.trainer import Trainer

SETTINGS = Settings(hidden=(12, 12), steps=50)


def stack(arm, rates, seeds, settings=SETTINGS, **options):
    return Stack("key", "phase", arm, rates, seeds, settings, **options)


def in_float64(dataset):
    return replace(dataset, dtype=np.float64)


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize("arm", ARMS)
def test_a_run_has_the_same_numbers_in_a_stack_and_alone_in_float64(digits, arm, optimizer):
    settings = replace(SETTINGS, optimizer=optimizer)
    rates, seeds = ((0.01, 0.3, 1.0), (4, 5, 4)) if optimizer == "sgd" else ((1e-4, 1e-3, 1e-2), (4, 5, 4))
    together = Trainer(in_float64(digits), arm, rates, seeds, settings)
    losses = torch.stack([together.step() for _ in range(50)])
    for i, (rate, seed) in enumerate(zip(rates, seeds, strict=True)):
        alone = Trainer(in_float64(digits), arm, [rate], [seed], settings)
        # 50 steps of sums of up to 64 terms in another order: 1e-16 grows, and stays under 1e-10
        torch.testing.assert_close(torch.cat([alone.step() for _ in range(50)]), losses[:, i], rtol=1e-10, atol=1e-10)
        for one, all_runs in zip(alone.network.run_state(), together.network.run_state(), strict=True):
            torch.testing.assert_close(one[0], all_runs[i], rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize("arm", ARMS)
def test_a_run_has_the_same_losses_as_training_in_torch(wine, arm, optimizer):
    data = in_float64(wine)
    settings = replace(SETTINGS, optimizer=optimizer, activation="tanh")
    ours = Trainer(data, arm, [0.01], [3], settings)
    twin = Trainer(data, arm, [0.01], [3], settings)
    network, (x, y) = twin.network, twin.parts["train"]
    descent = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}[optimizer](network.parameters(), lr=0.01)
    for _ in range(30):
        rows = next(twin.batches)[0]
        network.train()
        loss = torch.nn.functional.cross_entropy(network(x[rows])[0], y[rows])
        descent.zero_grad()
        loss.backward()
        descent.step()
        torch.testing.assert_close(ours.step()[0], loss.detach(), rtol=1e-9, atol=1e-9)
    assert network.hidden[0].placement == PLACEMENTS[arm]


@pytest.mark.parametrize("arm", ARMS)
def test_a_run_that_diverges_changes_nothing_in_its_neighbors(digits, arm):
    settings = replace(SETTINGS, activation="relu", steps=40)
    calm = train(stack(arm, (0.1, 0.1, 0.01), (0, 1, 2), settings, test=True), digits, lambda _: None)
    wild = train(stack(arm, (0.1, 1e30, 0.01), (0, 1, 2), settings, test=True), digits, lambda _: None)
    assert wild[1].diverged_at is not None
    for i in (0, 2):
        assert calm[i].diverged_at is None
        assert calm[i] == wild[i]


def test_a_diverged_run_has_no_score_even_where_most_rows_are_of_class_0():
    rows = 400
    y = (np.arange(rows) % 20 == 0).astype(int)
    frame = pl.DataFrame({"a": np.random.default_rng(0).normal(size=rows), "y": y})
    data = prepare(Table("rare", frame, "y"))
    settings = replace(SETTINGS, activation="relu")
    (run,) = train(stack("none", (1e30,), (0,), settings, test=True), data, lambda _: None)
    assert run.diverged_at is not None
    assert math.isnan(run.test.score)
    assert math.isnan(run.validation_score[-1])
    network = Trainer(data, "none", [1.0], [0], settings)
    with torch.no_grad():
        network.network.output.bias.fill_(math.nan)
    _, errors = network.errors("validation")
    assert 1 - errors.mean() > 0.9  # the score that argmax of NaN would have given


def test_arms_are_paired_in_weights_and_order_of_mini_batches(digits):
    trainers = [Trainer(digits, arm, [0.1], [7], SETTINGS) for arm in ARMS]
    for linears in zip(*(trainer.network.linears() for trainer in trainers), strict=True):
        assert all(torch.equal(linears[0].weight, linear.weight) for linear in linears)
    for _ in range(40):
        rows = [next(trainer.batches) for trainer in trainers]
        assert all(torch.equal(rows[0], other) for other in rows)


def test_seeds_differ_in_weights_and_order(digits):
    trainer = Trainer(digits, "none", [0.1, 0.1], [1, 2], SETTINGS)
    assert not torch.equal(*trainer.network.hidden[0].linear.weight)
    assert not torch.equal(*next(trainer.batches))


def test_an_epoch_shows_every_training_row_once(digits):
    trainer = Trainer(digits, "none", [0.1], [1], SETTINGS)
    rows = len(digits.parts["train"])
    seen = torch.cat([next(trainer.batches)[0] for _ in range(math.ceil(rows / 60))])
    assert torch.equal(seen.sort().values, torch.arange(rows))


def test_the_test_rows_are_scored_by_the_network_of_the_best_smoothed_step(digits):
    (run,) = train(stack("before", (0.3,), (0,), test=True), digits, lambda _: None)
    smoothed = [np.mean(run.validation_score[max(0, i - 2) : i + 1]) for i in range(len(run.validation_score))]
    steps = [*range(1, 21), 21, 23, 25, 27, 29, 31, 33, 35, 37, 39, 41, 44, 47, 50]
    assert run.test.step == steps[int(np.argmax(smoothed))]
    trainer = Trainer(digits, "before", [0.3], [0], SETTINGS)
    for _ in range(run.test.step):
        trainer.step()
    _, errors = trainer.errors("test")
    assert np.array_equal(run.test.row_errors("classification", errors.shape[1]), errors[0].numpy())
    assert run.test.score == pytest.approx(1 - errors.mean().item())


def test_a_stack_stops_once_more_than_half_the_seeds_of_a_rate_have_arrived(digits):
    target = Target("score", 0.2, "")
    runs = train(stack("before", (0.3, 1e-6) * 3, (0, 0, 1, 1, 2, 2), stop=target), digits, lambda _: None)
    assert len(runs[0].validation_score) < 30
    last = [run.validation_score[-3:] for run in runs if run.learning_rate == 0.3]
    assert sum(min(scores) >= 0.2 for scores in last) == 2 or all(min(scores) >= 0.2 for scores in last)


def test_progress_is_told_of_every_evaluation(digits):
    told = []
    train(stack("none", (0.1,), (0,)), digits, told.append)
    assert told[-1] == 50
    assert told == sorted(told)


def test_percentiles_of_the_inputs_of_the_last_nonlinearity_are_traced(digits):
    runs = train(stack("before", (0.3, 0.3), (0, 1), trace=True), digits, lambda _: None)
    assert runs[1].trace is None
    trace = np.array(runs[0].trace)
    assert trace.shape == (len(runs[0].validation_score), 6, 3)
    assert (np.diff(trace, axis=2) >= 0).all()


def test_a_step_of_every_arm_is_timed(wine):
    seconds = seconds_per_step(wine, {"none": 0.1, "before": 0.1}, SETTINGS)
    assert 0 < seconds["none"] < 1
    assert 0 < seconds["before"] < 1
