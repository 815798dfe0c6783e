"""Recorders: their records are those of the networks, and recording changes nothing."""

import copy
import math

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from batchnorm.lab.training.recorders import noise_batch_sizes, probe_steps
from batchnorm.lab.training.records import Records
from batchnorm.lab.training.runs import evaluation_steps
from batchnorm.lab.training.settings import ARMS, Settings
from batchnorm.lab.training.stacks import Stack
from batchnorm.lab.training.train import train
from batchnorm.lab.training.trainer import Trainer

SETTINGS = Settings(hidden=(7, 5), batch_size=40, steps=30, activation="tanh")
EVERY = ("loss_change", "gap", "shift")


def trained(digits, arm, records, rates=(0.1, 0.5), settings=SETTINGS):
    stack = Stack("key", "phase", arm, rates, tuple(range(len(rates))), settings, test=True, records=records)
    return train(stack, digits, lambda _: None)


@pytest.mark.parametrize("arm", ARMS)
def test_recording_changes_nothing_in_the_runs(digits, arm):
    plain, recorded = trained(digits, arm, ()), trained(digits, arm, EVERY)
    for one, other in zip(plain, recorded, strict=True):
        assert None not in (other.record.loss_change, other.record.gap, other.record.shift)
        other.record = Records()
        assert one == other


def test_the_gap_is_that_of_the_network_at_each_evaluation(digits):
    record = trained(digits, "before", ("gap",))[1].record.gap
    trainer = Trainer(digits, "before", (0.1, 0.5), (0, 1), SETTINGS)
    evaluations = evaluation_steps(SETTINGS.steps)
    for step in range(1, SETTINGS.steps + 1):
        trainer.step()
        if step in (1, 20, 30):
            at = evaluations.index(step)
            losses, errors = trainer.errors("train")
            assert record.train_loss[at] == pytest.approx(float(losses[1].mean()), rel=1e-5)
            assert record.train_score[at] == pytest.approx(1 - float(errors[1].mean()), abs=1e-6)
            _, errors = trainer.errors("test")
            assert record.test_score[at] == pytest.approx(1 - float(errors[1].mean()), abs=1e-6)


def test_the_change_of_the_loss_is_the_mean_since_the_previous_evaluation(digits):
    means = trained(digits, "none", ("loss_change",))[0].record.loss_change.mean
    trainer = Trainer(digits, "none", (0.1, 0.5), (0, 1), SETTINGS)
    losses = [float(trainer.step()[0]) for _ in range(30)]
    assert math.isnan(means[0])
    assert means[1] == pytest.approx(abs(losses[1] - losses[0]), rel=1e-5)
    evaluations = evaluation_steps(30)
    first, last = evaluations[-2], evaluations[-1]
    changes = [abs(losses[i] - losses[i - 1]) for i in range(first, last)]
    assert means[-1] == pytest.approx(sum(changes) / len(changes), rel=1e-4)


@pytest.fixture(scope="module")
def probed(digits):
    """Records of a stack, and its networks before and after the fifth step."""
    record = trained(digits, "after", ("shift",))[1].record.shift
    trainer = Trainer(digits, "after", (0.1, 0.5), (0, 1), SETTINGS)
    for _ in range(4):
        trainer.step()
    before = copy.deepcopy(trainer.network)
    trainer.step()
    return record, before, trainer, probe_steps(SETTINGS.steps).index(5)


def outputs_of(network, x):
    """Return the outputs of each hidden layer with the statistics of the batch, (runs, N, units)."""
    network = copy.deepcopy(network).train()
    seen = []
    for block in network.hidden:
        x = block(x if seen else x.expand(network.runs, *x.shape))
        seen.append(x.double())
    return seen


def test_the_drift_is_the_median_divergence_of_the_inputs_of_a_layer_in_one_step(probed):
    record, before, trainer, probe = probed
    x, _ = trainer.spaced_rows("train", 240)
    with torch.no_grad():
        pairs = zip(outputs_of(before, x), outputs_of(trainer.network, x), strict=True)
        for layer, (old, new) in enumerate(pairs):
            one, other = (Normal(v[1].mean(0), v[1].std(0, correction=0)) for v in (old, new))
            expected = (kl_divergence(one, other) + kl_divergence(other, one)).median()
            # moments of 240 float32 values to 1e-6 each, and a divergence is their squared difference
            assert record.drift[probe][layer] == pytest.approx(float(expected), rel=1e-2, abs=1e-9)


def test_the_change_of_the_gradient_is_that_after_a_step_along_itself(probed, digits):
    record, before, trainer, probe = probed
    x, y = trainer.spaced_rows("train", 240)

    def gradient(network):
        network.train()
        output = network(x)[1]
        loss = torch.nn.functional.cross_entropy(output, y)
        return [g.view(2, -1)[1] for g in torch.autograd.grad(loss, list(network.parameters()))]

    start = gradient(copy.deepcopy(before))
    for size, expected in zip((0.5, 1.0, 2.0), record.gradient_change[probe], strict=True):
        moved = copy.deepcopy(before)
        with torch.no_grad():
            for parameter, g in zip(moved.parameters(), start, strict=True):
                parameter.view(2, -1)[1] -= size * 0.5 * g
        change = torch.cat([a - b for a, b in zip(gradient(moved), start, strict=True)]).norm()
        assert float(change / torch.cat(start).norm()) == pytest.approx(expected, rel=1e-3)


def test_the_noise_of_a_batchs_mean_falls_with_the_root_of_its_size(digits):
    noise = trained(digits, "none", ("gap",))[0].record.gap.noise
    rows = len(digits.parts["train"])
    assert noise.batch_sizes == noise_batch_sizes(rows)
    for size, mean in zip(noise.batch_sizes, noise.mean, strict=True):
        expected = math.sqrt((1 - size / rows) / (1 - 1 / rows) / size)  # drawn without replacement
        assert mean == pytest.approx(expected, rel=0.15)  # 200 draws of 5 units, which go together: sd about 0.05


def test_a_run_that_diverges_changes_nothing_in_its_neighbors_record(digits):
    settings = Settings(hidden=(7, 5), batch_size=40, steps=30, activation="relu")
    together = trained(digits, "none", EVERY, (0.1, 1e6), settings)
    alone = trained(digits, "none", EVERY, (0.1,), settings)
    assert together[1].diverged_at is not None
    drift, expected = (runs[0].record.shift.drift for runs in (together, alone))
    for one, other in zip(drift, expected, strict=True):
        assert one == pytest.approx(other, rel=1e-2, abs=1e-9)


def test_the_probes_begin_at_the_first_step_and_end_at_the_last():
    for steps in (1, 10, 100, 1000):
        probes = probe_steps(steps)
        assert (probes[0], probes[-1]) == (1, steps)
        assert set(probes) <= set(evaluation_steps(steps))
        assert len(probes) <= 24
