"""Lightning's weight averaging and torch_geometric's reset leave frozen statistics, and those of other domains."""

import importlib
import warnings

import pytest
import torch
from torch import nn

import batchnorm as bn
from support import changed_names, copied_state, peer


def module_of(lightning, layers):
    class Module(lightning.pytorch.LightningModule):
        def __init__(self):
            super().__init__()
            self.layers = layers

        def training_step(self, batch, _):
            return self.layers(batch).square().mean()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.01)

    return Module()


def fit(lightning, layers, rows):
    """Train for 4 epochs, the last 2 of them averaged; an epoch more measures the statistics."""
    average = lightning.pytorch.callbacks.StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Lightning's own, about workers, and ours, which another test looks at
        trainer = lightning.pytorch.Trainer(
            max_epochs=4,
            accelerator="cpu",
            callbacks=[average],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(module_of(lightning, layers), torch.utils.data.DataLoader(rows, batch_size=8))


@pytest.fixture
def lightning():
    return peer("lightning")


def test_averaged_training_leaves_frozen_statistics_and_measures_the_others(lightning):
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(4, 3), bn.BatchNorm1d(3), nn.Linear(3, 3), bn.BatchNorm1d(3))
    layers(torch.randn(16, 4) + 2)
    bn.freeze(layers[1])
    before, free = copied_state(layers[1]), copied_state(layers[3])
    fit(lightning, layers, torch.randn(32, 4))
    kept = [name for name in before if name not in ("weight", "bias")]
    assert [name for name in changed_names(before, layers[1]) if name in kept] == []
    assert "running_mean" in changed_names(free, layers[3])
    assert int(layers[3].num_batches_tracked) == 4  # the batches of the epoch that measures


def test_averaged_training_within_a_domain_resets_that_domain_alone(lightning):
    torch.manual_seed(0)
    layers = bn.add_domains(nn.Sequential(nn.Linear(4, 3), bn.BatchNorm1d(3)), ["real", "drawn"])
    layers(torch.randn(16, 4) + 2)
    with bn.use_domain(layers, "drawn"):
        layers(torch.randn(16, 4) - 2)
    before = copied_state(layers[1])
    with bn.use_domain(layers, "real"):
        fit(lightning, layers, torch.randn(32, 4))
    changed = [name for name in changed_names(before, layers[1]) if name not in ("weight", "bias")]
    assert changed == ["running_mean_real", "running_var_real", "num_batches_tracked_real"]
    assert int(layers[1].num_batches_tracked_real) == 4


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch_geometric's import
def test_torch_geometrics_reset_leaves_frozen_statistics():
    peer("torch_geometric")
    inits = importlib.import_module("torch_geometric.nn.inits")
    model = nn.Sequential(bn.BatchNorm1d(3), bn.BatchNorm1d(3))
    model(torch.randn(16, 3) + 2)
    bn.freeze(model[0])
    before = copied_state(model[0])
    with pytest.warns(UserWarning, match="leaves frozen running statistics"):
        inits.reset(model)
    assert changed_names(before, model[0]) == []
    assert model[1].running_mean.tolist() == [0.0] * 3
