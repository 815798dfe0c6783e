"""Sample weights: a row of weight k counts as k rows."""

import math

import numpy as np
import pytest
import torch
from sklearn.base import clone

import batchnorm as bn
from batchnorm.lab.estimators import BatchNormMLPClassifier
from batchnorm.lab.estimators.sample_weight import SampleWeightedBatchNorm1d, weighted_rows
from support import assert_same_network, copied_buffers, unconverged

PLACEMENTS = ("before", "after", None)


@unconverged
@pytest.mark.parametrize("batch_norm", PLACEMENTS)
def test_a_row_of_weight_k_is_k_rows_and_of_weight_0_none(iris, batch_norm):
    X, y = iris
    times = np.arange(len(X)) % 4
    classifier = BatchNormMLPClassifier((5, 4), batch_norm=batch_norm, solver="sgd", random_state=0, max_iter=10)
    classifier.set_params(batch_size=int(times.sum()), shuffle=False)
    repeated = clone(classifier).fit(np.repeat(X, times, axis=0), np.repeat(y, times))
    weighted = classifier.set_params(batch_size=np.count_nonzero(times)).fit(X, y, sample_weight=times)
    assert_same_network(weighted, repeated, atol=1e-13)


@unconverged
def test_a_fitted_network_holds_no_sample_weights(iris):
    X, y = iris
    network = BatchNormMLPClassifier((5,), max_iter=1).fit(X, y, np.linspace(0.5, 4, len(X))).network_
    network(torch.from_numpy(X))
    z = torch.from_numpy(X) @ network.hidden[0].linear.weight[0]
    norm = network.hidden[0].norm.train()
    norm.momentum = 1.0
    norm(z)
    torch.testing.assert_close(norm.running_mean, z.mean(0))


@unconverged
def test_weights_that_sum_to_one_correct_the_running_variance_by_the_number_of_rows(iris):
    X, y = iris
    classifier = BatchNormMLPClassifier((5, 4), alpha=0.0, solver="sgd", random_state=0, max_iter=10)
    weighted = clone(classifier).fit(X, y, sample_weight=np.full(len(X), 1 / len(X)))
    assert_same_network(weighted, classifier.fit(X, y), atol=1e-13)


def test_weighted_statistics_of_a_channel_far_from_zero_keep_their_accuracy():
    x = 1e5 + torch.randn(64, 3, generator=torch.Generator().manual_seed(0))
    weight = torch.linspace(0.5, 4, 64)
    single, double = SampleWeightedBatchNorm1d(3), SampleWeightedBatchNorm1d(3).double()
    with weighted_rows(single, weight), weighted_rows(double, weight.double()):
        y, exact = single(x), double(x.double())
    # the mean alone, rounded to float32, would be off by up to 1e5 * 2^-24 = 6e-3 standard deviations
    torch.testing.assert_close(y.double(), exact, rtol=0, atol=1e-5)


def test_a_weighted_batch_that_is_not_finite_is_skipped():
    layer, weight = SampleWeightedBatchNorm1d(2), torch.tensor([1.0, 2.0, 3.0])
    with weighted_rows(layer, weight):
        layer(torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 0.0]]))
        before = copied_buffers(layer)
        layer(torch.tensor([[1.0, 2.0], [math.inf, 4.0], [5.0, 0.0]]))
    assert layer.skipped_batches == 1
    del before["skipped_batches"]
    assert all(torch.equal(layer.get_buffer(name), values) for name, values in before.items())


def test_a_weighted_batch_of_one_row_updates_nothing_but_the_count_of_batches():
    layer = SampleWeightedBatchNorm1d(2)
    with weighted_rows(layer, torch.tensor([0.5])):
        layer(torch.tensor([[1.0, 2.0]]))
    assert layer.num_batches_tracked == 1
    assert layer.running_mean.tolist() == [0, 0]
    assert layer.running_var.tolist() == [1, 1]


@unconverged
def test_a_weighted_fit_updates_no_statistics_while_updates_are_paused(iris):
    X, y = iris
    classifier = BatchNormMLPClassifier((5,), max_iter=2, random_state=0).fit(X, y)
    norm = classifier.network_.hidden[0].norm
    before = copied_buffers(norm)
    with bn.no_stat_updates(classifier.network_):
        classifier.partial_fit(X, y, np.linspace(0.5, 4, len(X)))
    assert all(torch.equal(norm.get_buffer(name), values) for name, values in before.items())


@unconverged
def test_frozen_statistics_are_used_and_kept_by_a_weighted_fit(iris):
    X, y = iris
    classifier = BatchNormMLPClassifier((5,), max_iter=2, random_state=0).fit(X, y)
    norm = bn.freeze(classifier.network_).hidden[0].norm
    before = copied_buffers(norm)
    classifier.partial_fit(X, y, np.linspace(0.5, 4, len(X)))
    assert all(torch.equal(norm.get_buffer(name), values) for name, values in before.items())


@pytest.mark.parametrize("weight", [-1.0, 0.0])
def test_weights_below_zero_or_all_zero_are_refused(iris, weight):
    X, y = iris
    with pytest.raises(ValueError, match=r"[Ss]ample.weight"):
        BatchNormMLPClassifier((5,)).fit(X, y, sample_weight=np.full(len(X), weight))
