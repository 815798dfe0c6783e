"""Trained models, imported by name."""

import sys

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from batchnorm.errors import InputError
from batchnorm.lab.serving.served import load

MODULE = """
import torch
from torch import nn
import batchnorm as bn

def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), bn.BatchNorm1d(4), nn.Linear(4, 2)).double()

model = network()
number = 3

class Holder:
    make = staticmethod(network)

def estimator():
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(40, 3, generator=generator).double().numpy()
    return bn.BatchNormMLPClassifier((4,), max_iter=3, batch_size=20, tol=1.0, n_iter_no_change=1).fit(X, X[:, 0] > 0)

def pipeline():
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(40, 3, generator=generator).double().numpy() * 10 + 5
    last = bn.BatchNormMLPClassifier((4,), max_iter=3, batch_size=20, tol=1.0, n_iter_no_change=1)
    return make_pipeline(StandardScaler(), last).fit(X, X[:, 0] > 5)

def fails():
    raise RuntimeError("no weights here\\nsecond line")
"""


@pytest.fixture(autouse=True)
def module(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    sys.modules.pop("mine", None)


@pytest.mark.parametrize("name", ["mine:network", "mine:model", "mine:Holder.make"])
def test_a_module_or_a_function_that_makes_one_is_found_in_the_working_folder(name):
    served = load(name)
    assert not served.model.training
    assert served.estimator is None
    x = served.to_input(np.arange(6.0).reshape(2, 3))
    assert x.dtype == torch.float64
    assert served.model(x).shape == (2, 2)
    assert str(sys.path[0]) != str(module)


@pytest.mark.parametrize("name", ["mine:estimator", "mine:pipeline"])
def test_an_estimators_network_gets_rows_as_its_pipeline_prepares_them(name):
    served = load(name)
    X = np.random.default_rng(0).normal(5, 10, (30, 3))
    with torch.no_grad():
        of_network = served.model(served.to_input(X))[0, :, 0] > 0
    assert of_network.tolist() == served.estimator.predict(X).tolist()


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_weights_are_loaded_strictly(suffix, module):
    trained = load("mine:network").model
    trained[1].running_mean.fill_(7.0)
    path = module / f"weights{suffix}"
    save_file(trained.state_dict(), path) if suffix == ".safetensors" else torch.save(trained.state_dict(), path)
    assert load("mine:network", path).model[1].running_mean.tolist() == [7.0] * 4
    state = {"0.weight": torch.zeros(4, 3)}
    save_file(state, path) if suffix == ".safetensors" else torch.save(state, path)
    with pytest.raises(InputError, match=r"^weights must hold a state dict of the model; .* Missing key"):
        load("mine:network", path)


def test_a_pickle_of_anything_but_weights_is_not_opened(module):
    torch.save(load("mine:network").model, module / "whole.pt")
    with pytest.raises(InputError, match=r"^weights must hold a state dict .* UnpicklingError"):
        load("mine:network", module / "whole.pt")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("mine", "must be MODULE:NAME, as in train:make_model; got 'mine'"),
        (":network", "must be MODULE:NAME"),
        ("nowhere:network", "ModuleNotFoundError: No module named 'nowhere'"),
        ("mine:missing", "AttributeError: module 'mine' has no attribute 'missing'"),
        ("mine:fails", "gives RuntimeError: no weights here$"),
        ("mine:number", "'mine:number' is int"),
    ],
)
def test_a_name_without_a_model_is_refused_in_one_sentence(name, said):
    with pytest.raises(InputError, match=said) as refused:
        load(name)
    assert "\n" not in str(refused.value)


def test_weights_belong_to_a_module_and_must_be_there(module):
    with pytest.raises(InputError, match=r"^weights must name a file; there is none at"):
        load("mine:network", module / "none.pt")
    with pytest.raises(InputError, match=r"^weights are for a torch Module; 'mine:estimator' is a fitted BatchNorm"):
        load("mine:estimator", module / "none.pt")
