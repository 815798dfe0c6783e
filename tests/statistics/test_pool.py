"""Pooling of the running statistics that each rank has gathered by itself, under DistributedDataParallel."""

import numpy as np
import pytest
import torch
from torch import nn

import batchnorm as bn

# Rank r trains on r + 1 batches of 8 rows about 10 r; the ranks' statistics are recorded before and after pooling.
TRAINED = """
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(3, 4), bn.BatchNorm1d(4), nn.Tanh(), nn.BatchNorm1d(4), bn.BatchNorm1d(4))
model[0].weight.data.fill_(1.0)
bn.add_domains(model[1], ["real"])
bn.freeze(model[4])
wrapped = DistributedDataParallel(model, broadcast_buffers=False)

def train(batches, seed=0):
    generator = torch.Generator().manual_seed(seed + rank)
    with torch.no_grad():  # ranks may then take different numbers of steps
        for _ in range(batches):
            wrapped(torch.randn(8, 3, generator=generator) + 10 * rank)

def statistics():
    return {name: values.tolist() for name, values in model.named_buffers() if "samples_seen" not in name}

train(rank + 1)
if rank == 1:
    with bn.use_domain(model[1], "real"):
        model[1](torch.randn(8, 4) + 5)
    model[4].running_mean.fill_(7.0)
"""


def pooled(ranks, weights, mean, var):
    """Weighted mean, and variance by the law of total variance: E[x^2] - E[x]^2 in float64."""
    weights = np.array(weights) / np.sum(weights)
    means, variances = (np.array([rank[name] for rank in ranks]) for name in (mean, var))
    whole = weights @ means
    return whole, weights @ (variances + means**2) - whole**2


def assert_pooled(after, before, weights, layer, suffix=""):
    names = f"{layer}.running_mean{suffix}", f"{layer}.running_var{suffix}"
    for name, expected in zip(names, pooled(before, weights, *names), strict=True):
        assert all(rank[name] == after[0][name] for rank in after)
        # float64, rounded once to float32
        np.testing.assert_allclose(after[0][name], expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("world", [2, 3])
def test_pooled_statistics_are_weighted_by_batches_since_the_last_pooling(on_ranks, world):
    code = """
    steps = [statistics()]
    bn.pool_running_stats(wrapped)
    steps.append(statistics())
    bn.pool_running_stats(wrapped)
    steps.append(statistics())
    train(3 - rank, seed=100)
    steps.append(statistics())
    bn.pool_running_stats(wrapped)
    steps.append(statistics())
    model[1].running_mean[2] = torch.nan if rank == 1 else 0.0
    train(1)
    try:
        bn.pool_running_stats(wrapped)
        steps.append("no error")
    except bn.InputError as error:
        steps.append(str(error))
    result = steps
    """
    ranks = on_ranks(TRAINED + unindented(code), world)
    before, after, again, trained, last, refused = zip(*ranks, strict=True)
    assert np.ptp([rank["1.running_mean"][0] for rank in before]) > 2
    for layer in (1, 3):
        assert_pooled(after, before, [rank + 1 for rank in range(world)], layer)
        assert_pooled(last, trained, [3 - rank for rank in range(world)], layer)
    # only rank 1 has updated the statistics of the domain, and so it has all the weight
    assert_pooled(after, before, [rank == 1 for rank in range(world)], 1, "_real")
    assert list(again) == list(after)
    for each in (after, last):
        assert [rank["4.running_mean"][0] for rank in each] == [7.0 * (rank == 1) for rank in range(world)]
    assert [rank["1.num_batches_tracked"] for rank in after] == [rank + 1 for rank in range(world)]
    assert all("finite" in text and "rank 1, of 1" in text for text in refused)


def unindented(code):
    return "\n".join(line[4:] for line in code.splitlines())


def test_samples_replace_batches_as_weights_and_broadcast_buffers_are_refused(on_ranks):
    code = """
    steps = [statistics()]
    try:
        bn.pool_running_stats(DistributedDataParallel(model))
        steps.append("no error")
    except bn.InputError as error:
        steps.append(str(error))
    model.load_state_dict({name: torch.tensor(values) for name, values in steps[0].items()}, strict=False)
    try:
        bn.pool_running_stats(wrapped, samples=None if rank else 30)
        steps.append("no error")
    except bn.DistributedError as error:
        steps.append(str(error))
    steps.append(statistics())
    bn.pool_running_stats(wrapped, samples=[30, 10][rank])
    steps.append(statistics())
    result = steps
    """
    before, broadcast, some, unchanged, after = zip(*on_ranks(TRAINED + unindented(code), 2), strict=True)
    assert all("broadcast_buffers=False" in text for text in broadcast)
    assert all("1 of 2 ranks" in text for text in some)
    assert unchanged == before
    assert_pooled(after, before, [30, 10], 1)
    assert_pooled(after, before, [30, 10], 3)


def test_a_single_process_has_nothing_to_pool():
    layer = bn.BatchNorm1d(2)
    layer(torch.randn(8, 2) + 3)
    before = layer.running_mean.clone()
    bn.pool_running_stats(layer)
    assert torch.equal(layer.running_mean, before)


@pytest.mark.parametrize(
    ("model", "options", "rule"),
    [(nn.Linear(2, 2), {}, "Linear has none"), (bn.BatchNorm1d(2), {"samples": -1}, "at least 0; got -1")],
)
def test_a_model_or_count_that_cannot_be_pooled_is_refused(model, options, rule):
    with pytest.raises(bn.InputError, match=rule):
        bn.pool_running_stats(model, **options)


@pytest.mark.parametrize("odd", ["nn.BatchNorm1d(5)", "nn.Tanh()", "bn.freeze(bn.BatchNorm1d(4))"])
def test_ranks_with_different_layers_are_named(on_ranks, odd):
    code = f"""
    model = nn.Sequential(nn.BatchNorm1d(4), nn.BatchNorm1d(4) if rank == 0 else {odd})
    try:
        bn.pool_running_stats(model)
        message = ""
    except bn.DistributedError as error:
        message = str(error)
    result = {{"message": message, "mean": model[0].running_mean.tolist()}}
    """
    ranks = on_ranks(code, 2)
    assert all("all ranks must have the same layers with statistics to pool" in rank["message"] for rank in ranks)
    assert "this one ('1', 4)" in ranks[0]["message"]
    assert all(rank["mean"] == [0] * 4 for rank in ranks)


def test_a_rank_is_weighted_by_the_samples_it_trained_on_in_this_process(on_ranks):
    """Batches of 64 about 0 and of 4 about 10, and a count of batches that a checkpoint brought along."""
    code = """
    layer = bn.BatchNorm1d(1, momentum=None)
    model = DistributedDataParallel(nn.Sequential(layer), broadcast_buffers=False)
    state = layer.state_dict() | {"num_batches_tracked": torch.tensor(10_000)}
    layer.load_state_dict(state)
    layer.momentum = 0.5
    size, mean = [(64, 0.0), (4, 10.0)][rank]
    with torch.no_grad():
        for _ in range(10):
            model(torch.arange(float(size)).unsqueeze(1) / size - (size - 1) / 2 / size + mean)
        steps = [layer.samples_seen.item(), layer.running_mean.item()]
        bn.pool_running_stats(model)
        steps += [layer.running_mean.item(), layer.running_var.item(), layer.samples_seen.item()]
    own = "samples_seen" in layer.state_dict()
    result = {"steps": steps, "own": own}
    """
    ranks = on_ranks(code, 2)
    assert [rank["steps"][0] for rank in ranks] == [640, 40]
    means = [rank["steps"][1] for rank in ranks]
    expected = (640 * means[0] + 40 * means[1]) / 680
    assert all(rank["steps"][2] == pytest.approx(expected, abs=1e-5) for rank in ranks)
    assert expected == pytest.approx(10 / 17, abs=0.01)
    assert all(rank["steps"][4] == 0 and not rank["own"] for rank in ranks)


def test_a_domain_and_a_compiled_layer_count_their_own_samples(on_ranks):
    code = """
    layer = bn.add_domains(bn.BatchNorm1d(2), ["real"])
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    for size in (4, 6):
        layer(torch.randn(size, 2))
        compiled(torch.randn(size, 2))
    with bn.use_domain(layer, "real"):
        layer(torch.randn(8, 2))
    with bn.no_stat_updates(layer):
        layer(torch.randn(8, 2))
    layer.eval()(torch.randn(8, 2))
    result = [layer.samples_seen.item(), layer.samples_seen_real.item()]
    """
    assert on_ranks(code, 1) == [[20, 8]]
