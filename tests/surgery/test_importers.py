"""`from_keras`, `from_flax` and the way back, on arrays: names, shapes, dtypes and conventions."""

import copy
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import pytest
import torch
from torch import nn

import batchnorm as bn
from support import randn

NAMES = {
    "keras": ["gamma", "beta", "moving_mean", "moving_variance"],
    "flax": ["scale", "bias", "mean", "var"],
}
READ = {"keras": bn.from_keras, "flax": bn.from_flax}
WRITE = {"keras": bn.to_keras, "flax": bn.to_flax}


def arrays(library="keras", channels=3, seed=0, dtype=np.float32):
    values = np.random.default_rng(seed).uniform(0.5, 2, (4, channels)).astype(dtype)
    return dict(zip(NAMES[library], values, strict=True))


def linen(names, **kwargs):
    """Variables of linen for layers of these names."""
    variables = {"params": {}, "batch_stats": {}}
    for seed, name in enumerate(names):
        found = arrays("flax", seed=seed, **kwargs)
        variables["params"][name] = {key: found[key] for key in ("scale", "bias")}
        variables["batch_stats"][name] = {key: found[key] for key in ("mean", "var")}
    return variables


def network():
    return nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.ReLU(), nn.Linear(3, 3), bn.BatchNorm1d(3))


def flat(tree, prefix=""):
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{key}/")
        else:
            yield f"{prefix}{key}", value


def assert_same_arrays(found, expected):
    found, expected = dict(flat(found)), dict(flat(expected))
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        assert found[name].dtype == values.dtype, name
        assert found[name].tobytes() == values.tobytes(), name


# One layer.


@pytest.mark.parametrize("library", NAMES)
def test_a_layer_computes_the_formula_with_the_arrays(library):
    given = arrays(library, dtype=np.float64)
    scale, shift, mean, var = given.values()
    layer, x = READ[library](given, epsilon=0.1).eval(), randn(5, 3, 2, dtype=torch.float64)
    by_channel = [torch.from_numpy(values)[:, None] for values in (scale, shift, mean, var)]
    weight, bias, center, variance = by_channel
    # float64: some roundings of 1e-16
    torch.testing.assert_close(layer(x), (x - center) / (variance + 0.1).sqrt() * weight + bias, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize(("library", "eps"), [("keras", 1e-3), ("flax", 1e-5)])
def test_a_layer_has_the_conventions_of_the_library_turned(library, eps):
    layer = READ[library](arrays(library))
    assert (layer.eps, layer.momentum, layer.unbiased, layer.training) == (eps, 0.01, False, True)
    assert READ[library](arrays(library), epsilon=0.25, momentum=0.9).momentum == 0.1
    assert READ[library](arrays(library), momentum=0.05).momentum == 0.95  # without a warning of Keras's convention


@pytest.mark.parametrize("library", NAMES)
def test_a_step_moves_the_statistics_as_the_library_does(library):
    given, x = arrays(library, dtype=np.float64), randn(6, 3, dtype=torch.float64)
    layer = READ[library](given, momentum=0.75)
    layer(x)
    _, _, mean, var = given.values()
    torch.testing.assert_close(layer.running_mean, 0.75 * torch.from_numpy(mean) + 0.25 * x.mean(0))
    torch.testing.assert_close(layer.running_var, 0.75 * torch.from_numpy(var) + 0.25 * x.var(0, correction=0))


@pytest.mark.parametrize("library", NAMES)
@pytest.mark.parametrize("absent", [[], [0], [1], [0, 1]], ids=["both", "no scale", "no shift", "neither"])
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_arrays_come_back_bit_for_bit(library, absent, dtype):
    given = arrays(library, dtype=dtype)
    for position in absent:
        del given[NAMES[library][position]]
    back = WRITE[library](READ[library](given))
    back = back if library == "keras" else {**back["params"], **back["batch_stats"]}
    for name, values in given.items():
        # Statistics are never narrower than float32, which holds each float16.
        expected = values.astype(np.float32) if dtype == np.float16 and name in NAMES[library][2:] else values
        assert back[name].dtype == expected.dtype
        assert back[name].tobytes() == expected.tobytes()
    assert list(back) == list(given)


@pytest.mark.parametrize("library", NAMES)
def test_bfloat16_arrays_keep_their_values(library):
    given = arrays(library, dtype=ml_dtypes.bfloat16)
    layer = READ[library](given)
    assert layer.weight.dtype is torch.bfloat16
    assert layer.running_var.dtype is torch.float32
    back = dict(flat(WRITE[library](layer)))
    for (name, values), found in zip(given.items(), back.values(), strict=True):
        assert np.array_equal(found, values.astype(np.float32)), name


def test_the_list_of_get_weights_has_its_order():
    given = arrays()
    assert_same_arrays(bn.to_keras(bn.from_keras(list(given.values()))), given)
    layer = bn.from_keras(list(given.values())[2:])
    assert layer.weight is None
    assert layer.bias is None
    with pytest.raises(bn.InputError, match=r"got 3 arrays\. Give a mapping with these names"):
        bn.from_keras(list(given.values())[1:])


def test_the_layer_owns_its_arrays():
    given = arrays()
    kept, layer = copy.deepcopy(given), bn.from_keras(given)
    layer(randn(4, 3))
    back = bn.to_keras(layer)
    back["gamma"][:] = 7
    assert_same_arrays(given, kept)
    assert layer.weight.max() < 7


def test_tensors_are_taken_as_arrays():
    given = {name: torch.from_numpy(values).requires_grad_() for name, values in arrays().items()}
    assert_same_arrays(bn.to_keras(bn.from_keras(given)), arrays())


@pytest.mark.parametrize("order", ["F", "strided", "big endian"])
def test_the_memory_of_an_array_makes_no_difference(order):
    given = arrays()
    odd = {
        "F": np.asfortranarray(given["gamma"]),
        "strided": np.repeat(given["gamma"], 2)[::2],
        "big endian": given["gamma"].astype(">f4"),
    }[order]
    assert_same_arrays(bn.to_keras(bn.from_keras(given | {"gamma": odd})), given)


# A model.


@pytest.mark.parametrize("inplace", [False, True])
def test_a_model_takes_arrays_by_a_mapping_of_names(inplace):
    model = network()
    before, parameters = copy.deepcopy(model.state_dict()), [*model.parameters()]
    source = {"a": arrays(seed=1), "b": arrays(seed=2), "dense/kernel": np.ones((3, 4))}
    names = {"b": "1", "a": "4"}
    made, report = bn.from_keras(source, model, names, inplace=inplace)
    assert [(row.path, row.before, row.after) for row in report.layers] == [
        ("1", "BatchNorm1d", "bn.BatchNorm1d of b"),
        ("4", "bn.BatchNorm1d", "bn.BatchNorm1d of a"),
    ]
    assert all(isinstance(made[i], bn.BatchNorm1d) and not made[i].unbiased for i in (1, 4))
    assert_same_arrays(bn.to_keras(made, names), {"b": arrays(seed=2), "a": arrays(seed=1)})
    if inplace:
        assert made is model
        assert all(a is b for a, b in zip(made.parameters(), parameters, strict=True))
    else:
        assert type(model[1]) is nn.BatchNorm1d
        assert all(torch.equal(values, before[name]) for name, values in model.state_dict().items())
        assert "make a new optimizer" in str(report)


def test_equal_paths_need_no_names():
    model = nn.ModuleDict({"block": nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm1d(3))})
    source = {f"block/{i}/{name}:0": values for i in (1, 0) for name, values in arrays(seed=i).items()}
    made, _ = bn.from_keras(source, model)
    assert_same_arrays(bn.to_keras(made), {f"block/{i}": arrays(seed=i) for i in (0, 1)})


def test_layers_that_names_leaves_out_stay_and_are_named():
    model, report = bn.from_keras({"a": arrays()}, network(), {"a": "4"})
    assert type(model[1]) is nn.BatchNorm1d
    assert [(row.path, row.kind, row.reason) for row in report.left] == [
        ("1", "BatchNorm1d", "names has no layer for it")
    ]


def test_layers_of_keras_are_paired_in_the_order_given():
    source = {"z": arrays(seed=1), "a": arrays(seed=2)}
    model, _ = bn.from_keras(source, network(), "order")
    assert_same_arrays(bn.to_keras(model), {"1": source["z"], "4": source["a"]})


def test_layers_of_flax_are_paired_by_their_numbers():
    names = sorted(f"BatchNorm_{i}" for i in range(11))  # BatchNorm_10 is before BatchNorm_2
    model = nn.Sequential(*[nn.BatchNorm1d(3) for _ in range(11)])
    source = linen(names)
    made, _ = bn.from_flax(source, model, "order")
    assert_same_arrays(bn.to_flax(made, {f"BatchNorm_{i}": str(i) for i in range(11)}), source)


def test_an_order_that_the_names_do_not_show_is_refused():
    message = "must differ by a number alone, since Flax sorts them; got Block_0, bn_init in the state"
    with pytest.raises(bn.InputError, match=message):
        bn.from_flax(linen(["bn_init", "Block_0"]), network(), "order")


def test_nested_variables_come_back_as_they_were():
    inner = linen(["BatchNorm_0"])
    source = {name: {"Block_0": inner[name], "other": {"u": np.ones(2)}} for name in inner}
    source["params"]["LayerNorm_0"] = {"scale": np.ones(3), "bias": np.ones(3)}
    names = {"Block_0/BatchNorm_0": "1"}
    made, _ = bn.from_flax(source, network(), names)
    assert_same_arrays(bn.to_flax(made, names), {name: {"Block_0": inner[name]} for name in inner})


def test_flattened_variables_with_tuples_as_keys_are_read():
    variables = linen(["a"])
    source = {tuple(path.split("/")): values for path, values in flat(variables)}
    found = bn.to_flax(bn.from_flax(source))
    assert_same_arrays(found, {collection: variables[collection]["a"] for collection in variables})


def test_a_train_state_is_read():
    state = SimpleNamespace(**linen(["a"]), step=3)
    assert bn.from_flax(state).num_features == 3


def test_a_scale_that_is_lacking_there_is_a_constant_one():
    given = arrays()
    del given["gamma"]
    model = network()
    with torch.no_grad():
        model[1].weight.fill_(5)
    made, report = bn.from_keras({"a": given}, model, {"a": "1"})
    assert torch.equal(made[1].weight, torch.ones(3))
    assert not made[1].weight.requires_grad
    assert made[1].bias.requires_grad
    assert "1 has a weight that Keras's layer lacks; it is constant." in report.notes


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_layers_of_a_model_keep_their_dtype(dtype):
    made, _ = bn.from_keras({"a": arrays()}, nn.Sequential(bn.BatchNorm1d(3)).to(dtype))
    assert made[0].weight.dtype is dtype
    torch.testing.assert_close(made[0].weight, torch.from_numpy(arrays()["gamma"]).to(dtype))


def test_options_mode_and_hooks_of_a_layer_stay():
    layer = bn.BatchNorm1d(3, activation="relu", small_batch="running").eval()
    layer.register_forward_hook(lambda *_: None)
    made, _ = bn.from_keras(arrays(), layer)
    assert (made.activation, made.small_batch, made.training) == ("relu", "running", False)
    assert len(made._forward_hooks) == 1


def test_a_frozen_layer_takes_the_arrays_and_stays_frozen():
    made, _ = bn.from_keras(arrays(), bn.freeze(bn.BatchNorm1d(3), affine=True))
    assert_same_arrays(bn.to_keras(made), arrays())
    assert made.frozen_statistics
    assert made.frozen_affine


def test_torchs_layers_give_their_arrays():
    model = nn.Sequential(nn.BatchNorm1d(3, affine=False))
    assert list(bn.to_keras(model[0])) == ["moving_mean", "moving_variance"]
    assert bn.to_flax(model)["params"] == {}
    assert list(bn.to_flax(model)["batch_stats"]) == ["0"]


# Bad input.

GOOD = arrays()


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({"a": {k: v for k, v in GOOD.items() if k != "moving_variance"}}, "a must have .* no moving_variance among"),
        (GOOD | {"gamma": np.ones(2, np.float32)}, r"got gamma of shape \(2,\) beside moving_mean of shape \(3,\)"),
        ({k: v[None] for k, v in GOOD.items()}, r"one number per channel, .* got gamma of shape \(1, 3\)"),
        (GOOD | {"beta": np.ones(3, int)}, "beta of the layer must be an array of floating numbers; got dtype int64"),
        (GOOD | {"beta": torch.ones(3, dtype=torch.int8)}, "floating numbers; got dtype torch.int8"),
        ({"kernel": np.ones(3)}, "source must have a batch normalization layer, .*; dict has none"),
        ({"a": GOOD, "b": GOOD}, "source must be a single layer where no model is given; got 2, the first 'a'"),
        ({}, "dict has none"),
    ],
)
def test_bad_arrays_raise_a_sentence(source, message):
    with pytest.raises(bn.InputError, match=message):
        bn.from_keras(source)


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ({"momentum": 1.5}, "momentum must be the weight of the old value, from 0 to 1; got 1.5"),
        ({"momentum": "0.9"}, "momentum must be a number from 0; got '0.9'"),
        ({"epsilon": -1}, "epsilon must be a number from 0; got -1"),
    ],
)
def test_bad_numbers_raise_a_sentence(numbers, message):
    with pytest.raises(bn.InputError, match=message):
        bn.from_flax(arrays("flax"), **numbers)


@pytest.mark.parametrize(("read", "name"), [(bn.from_keras, "Keras"), (bn.from_flax, "linen")])
@pytest.mark.parametrize("source", [3, "bn", None])
def test_an_unknown_source_raises_a_sentence(read, name, source):
    with pytest.raises(bn.InputTypeError, match=f"source must be .*{name}.*; got {type(source).__name__}"):
        read(source)


def test_variables_without_statistics_name_the_collection():
    with pytest.raises(bn.InputError, match="linen keeps them in batch_stats"):
        bn.from_flax({"params": linen(["a"])["params"]})


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (None, "names must say which layer .*; got 'a', 'b' in Keras and '1', '4' in the model"),
        ({"c": "1"}, "names must name layers of Keras, such as 'a', 'b'; got 'c'"),
        ({"a": "2"}, "names must name layers of the model, such as '1', '4'; got '2'"),
        ({"a": "1", "b": "1"}, "names must name each layer of the model once"),
        ({"a": "4", "wide": "1"}, "names must name layers of Keras"),
    ],
)
def test_bad_names_raise_a_sentence_and_change_nothing(names, message):
    model = network()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(bn.InputError, match=message):
        bn.from_keras({"a": arrays(), "b": arrays()}, model, names, inplace=True)
    assert type(model[1]) is nn.BatchNorm1d
    assert all(torch.equal(values, before[name]) for name, values in model.state_dict().items())


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (nn.BatchNorm1d(5), "0 must have as many channels as Keras; got 5 and 3"),
        (nn.BatchNorm1d(3, affine=False), "0 must have a weight, which takes gamma; got None"),
        (nn.BatchNorm1d(3, track_running_stats=False), "0 must have a running_mean, which takes moving_mean"),
        (nn.LazyBatchNorm1d(), "0 is lazy and must have seen a batch"),
        (nn.utils.parametrizations.weight_norm(bn.BatchNorm1d(3), dim=None), "got a parametrized one"),
        (nn.LayerNorm(3), "from_keras needs a model with batch normalization layers"),
    ],
    ids=["channels", "affine", "statistics", "lazy", "parametrized", "none"],
)
def test_a_layer_that_cannot_take_the_arrays_raises_a_sentence(layer, message):
    with pytest.raises(bn.InputError, match=message):
        bn.from_keras(arrays(), nn.Sequential(layer))


def test_unequal_numbers_of_layers_have_no_order():
    with pytest.raises(bn.InputError, match="must have as many layers; got 1 in Keras and 2 in the model"):
        bn.from_keras({"a": arrays()}, network(), "order")


def test_a_layer_without_statistics_has_no_arrays():
    with pytest.raises(bn.InputError, match="1 must have running statistics"):
        bn.to_keras(nn.Sequential(nn.ReLU(), bn.BatchNorm1d(3, track_running_stats=False)))


@pytest.mark.parametrize("value", [-1.0, float("nan")])
def test_a_variance_that_is_none_is_refused(value):
    weights = [np.ones(3), np.zeros(3), np.zeros(3), np.array([1.0, value, 2.0])]
    with pytest.raises(bn.InputError, match=r"moving_variance of the layer must have no negative number and no NaN"):
        bn.from_keras(weights)
