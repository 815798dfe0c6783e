"""Batches of torch_geometric, as its DataLoader yields them, in everything that goes over a loader."""

import pytest
import torch
from torch import nn

import batchnorm as bn
from support import peer, randn

GRAPHS, PER_BATCH = 24, 6


@pytest.fixture(scope="module")
def pyg():
    return peer("torch_geometric")


@pytest.fixture
def loader(pyg):
    """Return a loader of graphs of 2 to 9 nodes, each a ring, with 4 features per node."""
    graphs = []
    for i in range(GRAPHS):
        nodes = 2 + i % 8
        ring = torch.stack([torch.arange(nodes), torch.arange(nodes).roll(1)])
        graphs.append(pyg.data.Data(x=randn(nodes, 4, seed=i) + 1, edge_index=ring, y=torch.tensor([i % 2])))
    return pyg.loader.DataLoader(graphs, batch_size=PER_BATCH)


class GraphNetwork(nn.Module):
    """Two convolutions over the graph with a normalization of the nodes between, and one of the graphs after them."""

    def __init__(self, layers):
        super().__init__()
        self.first, self.second, self.pool = layers.GCNConv(4, 8), layers.GCNConv(8, 8), layers.global_mean_pool
        self.nodes, self.graphs = bn.BatchNorm1d(8, activation="relu"), bn.BatchNorm1d(8)

    def forward(self, x, edge_index, batch):
        x = self.second(self.nodes(self.first(x, edge_index)), edge_index)
        return self.graphs(self.pool(x, batch))


@pytest.fixture
def model(pyg):
    torch.manual_seed(0)
    return GraphNetwork(pyg.nn)


def run(model, batch):
    return model(batch.x, batch.edge_index, batch.batch)


CALLS = [
    bn.recalibrate,
    lambda *args, **options: bn.recalibrate(*args, mode="at_once", **options),
    bn.adapt,
    bn.detect_shift,
]


@pytest.mark.parametrize("call", CALLS, ids=["recalibrate", "at once", "adapt", "detect_shift"])
def test_graphs_are_counted_by_the_user_and_by_nobody_else(call, model, loader):
    with pytest.raises(bn.InputTypeError, match="got DataBatch: pass samples="):
        call(model, loader, forward=run)
    assert call(model, loader, forward=run, samples=lambda batch: batch.num_graphs).samples == GRAPHS


def test_the_samples_decide_how_far_statistics_are_adapted(model, loader):
    report = bn.adapt(model, loader, forward=run, samples=lambda batch: batch.num_graphs)
    nodes = sum(batch.num_nodes for batch in loader)
    assert [layer.count for layer in report.layers] == [nodes, GRAPHS]
    assert str(report).endswith("24 samples count 60%, with a prior of 16")


def test_a_batch_of_graphs_moves_as_a_whole(loader):
    from batchnorm.statistics.batches import moved

    arrived = moved([next(iter(loader))], torch.device("meta"))[0]
    assert all(values.is_meta for values in (arrived.x, arrived.edge_index, arrived.batch, arrived.y))
    assert arrived.num_graphs == PER_BATCH


def test_lightning_moves_the_same_parts_of_a_batch(loader):
    from batchnorm.statistics.batches import moved

    move = peer("lightning").pytorch.utilities.move_data_to_device
    graphs = next(iter(loader))
    batch = {"x": torch.zeros(2), "graphs": graphs, "more": [(torch.zeros(3), "text"), None, 1.5]}
    ours, theirs = moved(batch, torch.device("meta")), move(batch, torch.device("meta"))
    for arrived in (ours, theirs):
        assert arrived["x"].is_meta
        assert arrived["graphs"].x.is_meta
        assert arrived["more"][0][0].is_meta
    assert ours["more"][1:] == theirs["more"][1:] == [None, 1.5]
    assert ours["more"][0][1] == theirs["more"][0][1] == "text"
