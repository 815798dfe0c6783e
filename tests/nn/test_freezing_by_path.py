"""Freezing of the layers that patterns choose by their paths."""

import pytest
from torch import nn

import batchnorm as bn


def stage(norm):
    return nn.Sequential(nn.Linear(4, 4), norm(4), nn.Sequential(nn.Linear(4, 4), norm(4)))


def network(norm=bn.BatchNorm1d, **stages):
    model = nn.Module()
    for name, kind in {"stem": norm, "layer1": norm, "layer10": norm, **stages}.items():
        model.add_module(name, stage(kind))
    return model


def frozen(model):
    return [path for path, layer in model.named_modules() if getattr(layer, "frozen_statistics", False)]


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        ("layer1.*", ["layer1.1", "layer1.2.1"]),
        (["stem.*", "layer10.1"], ["stem.1", "stem.2.1", "layer10.1"]),
        (("*.2.1",), ["stem.2.1", "layer1.2.1", "layer10.2.1"]),
        ("layer1?.1", ["layer10.1"]),
        ("layer1.[0-9]", ["layer1.1"]),
    ],
    ids=str,
)
def test_patterns_choose_the_layers_whose_paths_match(patterns, expected):
    model = network()
    assert bn.freeze(model, layers=patterns) is model
    assert frozen(model) == expected


def test_patterns_choose_the_layers_to_unfreeze():
    model = bn.freeze(network())
    bn.unfreeze(model, layers=["layer1*"])
    assert frozen(model) == ["stem.1", "stem.2.1"]


def test_patterns_from_a_generator_are_read_once():
    assert frozen(bn.freeze(network(), layers=(name for name in ("stem.*", "layer1.*")))) == [
        "stem.1",
        "stem.2.1",
        "layer1.1",
        "layer1.2.1",
    ]


def test_affine_of_the_chosen_layers_alone_is_frozen():
    model = bn.freeze(network(), affine=True, layers="stem.*")
    trainable = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    assert trainable == ["stem.1.weight", "stem.1.bias", "stem.2.1.weight", "stem.2.1.bias"]


def test_a_shared_layer_is_chosen_by_any_of_its_names():
    layer = bn.BatchNorm1d(4)
    model = nn.ModuleDict({"first": nn.Sequential(layer), "second": nn.Sequential(layer)})
    bn.freeze(model, layers="second.*")
    assert layer.frozen_statistics


def test_a_model_that_is_a_layer_is_chosen_by_a_star():
    assert bn.freeze(bn.BatchNorm1d(2), layers="*").frozen_statistics


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        ("layer1", r"must match a batch normalization layer; got 'layer1'\. Did you mean 'layer1\.\*'\?"),
        (["stem.*", "layer1.2.0"], r"got 'layer1\.2\.0'\. Close to it are layer1\.2\.1"),
        ("Layer1.1", "got 'Layer1.1'. Close to it are layer1.1"),
        ("head.*", r"got 'head\.\*'\. The names begin with stem\.1, stem\.2\.1, layer1\.1"),
    ],
    ids=str,
)
def test_a_pattern_that_matches_no_layer_is_an_error_with_close_paths(patterns, message):
    model = network()
    for verb in (bn.freeze, bn.unfreeze):
        with pytest.raises(bn.InputError, match=message):
            verb(model, layers=patterns)
    assert frozen(model) == []


def test_patterns_that_are_no_texts_are_a_type_error():
    for wrong in (3, ["stem.*", 3], [nn.Linear]):
        with pytest.raises(bn.InputTypeError, match=r"layers must be a glob pattern or several, as 'layer1\.\*'"):
            bn.freeze(network(), layers=wrong)


def test_no_pattern_at_all_is_an_error():
    with pytest.raises(bn.InputError, match=r"at least one glob pattern; got \[\]"):
        bn.freeze(network(), layers=[])


def test_torchs_layers_are_refused_where_they_are_chosen_and_nothing_is_frozen():
    model = network(layer1=nn.BatchNorm1d)
    with pytest.raises(bn.InputError, match=r"got layer1\.1, a BatchNorm1d\. Call batchnorm\.convert"):
        bn.freeze(model, layers=["stem.*", "layer1.*"])
    assert frozen(model) == []
    assert frozen(bn.freeze(model, layers="layer10.*")) == ["layer10.1", "layer10.2.1"]


def test_a_chosen_layer_without_running_statistics_is_named():
    model = network(layer1=lambda features: bn.BatchNorm1d(features, track_running_stats=False))
    with pytest.raises(bn.InputError, match=r"^layer1\.1 must keep running statistics"):
        bn.freeze(model, layers="*")
    assert frozen(model) == []
    assert frozen(bn.freeze(model, layers="stem.1")) == ["stem.1"]


def test_a_model_without_batch_normalization_is_refused_whatever_the_patterns_are():
    with pytest.raises(bn.InputError, match="Linear has none"):
        bn.freeze(nn.Linear(2, 2), layers="*")
