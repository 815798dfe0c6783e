"""The worked example: its figures, recalculated by hand or by torch, and its text."""

import json
import math

import pytest
import torch
from torch import nn

from batchnorm import DataError, InputError
from batchnorm.lab.teaching.worked_example import MiniBatch, worked_example
from support import ROOT

FEATURES = [(8.9, 100.0), (6.2, 89.0), (9.1, 91.0), (7.7, 76.0)]
PLACED = [1.0, 0.0, 0.0, 1.0]
Z = [cgpa + 0.1 * iq - 16 for cgpa, iq in FEATURES]

# Float64 arithmetic of a few operations on numbers near 1; figures are rounded to 1.1e-16 at each.
TIGHT = 1e-12


def normalized(values, eps=1e-5):
    """Calculate mean, biased variance and z_hat."""
    mean = sum(values) / len(values)
    var = sum((v - mean) ** 2 for v in values) / len(values)
    return mean, var, [(v - mean) / math.sqrt(var + eps) for v in values]


def sigmoid(v):
    return 1 / (1 + math.exp(-v))


def section(text, number):
    """Return the lines of a numbered section without blank ones."""
    lines = [line for line in text.splitlines() if line]
    start = next(i for i, line in enumerate(lines) if line.startswith(f"{number}. "))
    end = next((i for i, line in enumerate(lines) if line.startswith(f"{number + 1}. ")), len(lines))
    return lines[start:end]


@pytest.fixture(scope="module")
def example():
    return worked_example()


@pytest.fixture(scope="module")
def figures(example):
    return json.loads(example.to_json())


def test_the_default_neuron_is_z11_of_cgpa_and_iq(figures):
    assert figures["features"] == ["cgpa", "iq"]
    assert [tuple(row["features"]) for row in figures["rows"]] == FEATURES
    assert figures["neuron"]["weights"] == [1.0, 0.1]
    assert figures["neuron"]["bias"] == -16.0
    assert figures["neuron"]["z"] == pytest.approx(Z, rel=TIGHT)


def test_before_the_nonlinearity_z_is_normalized_and_the_activation_comes_last(figures):
    mean, var, z_hat = normalized(Z)
    before = figures["before"]

    assert before["input"] == figures["neuron"]["z"]
    assert (before["mean"], before["var"], before["sd"]) == pytest.approx((mean, var, math.sqrt(var)), rel=TIGHT)
    assert before["z_hat"] == pytest.approx(z_hat, rel=TIGHT)
    assert before["y"] == before["z_hat"]
    assert before["output"] == pytest.approx([sigmoid(v) for v in z_hat], rel=TIGHT)
    assert (before["gamma"], before["beta"]) == (1.0, 0.0)


def test_after_the_nonlinearity_the_activation_is_normalized(figures):
    a = [sigmoid(v) for v in Z]
    mean, var, z_hat = normalized(a)
    after = figures["after"]

    assert after["input"] == pytest.approx(a, rel=TIGHT)
    assert (after["mean"], after["var"]) == pytest.approx((mean, var), rel=TIGHT)
    assert after["z_hat"] == pytest.approx(z_hat, rel=TIGHT)
    assert after["output"] == after["y"] == after["z_hat"]


def test_the_step_before_the_nonlinearity_follows_the_gradient_of_the_squared_error(figures):
    _, _, z_hat = normalized(Z)
    o = [sigmoid(v) for v in z_hat]
    dy = [2 / 4 * (s - t) * s * (1 - s) for s, t in zip(o, PLACED, strict=True)]
    dgamma, dbeta = sum(d * v for d, v in zip(dy, z_hat, strict=True)), sum(dy)
    new_o = [sigmoid((1 - 0.1 * dgamma) * v - 0.1 * dbeta) for v in z_hat]
    step = figures["before"]["step"]

    assert list(step["gamma"].values()) == pytest.approx([1.0, dgamma, 1 - 0.1 * dgamma], rel=TIGHT)
    assert list(step["beta"].values()) == pytest.approx([0.0, dbeta, -0.1 * dbeta], rel=1e-10)  # dbeta cancels
    assert step["loss"]["value"] == pytest.approx(sum((s - t) ** 2 for s, t in zip(o, PLACED, strict=True)) / 4)
    assert step["loss"]["new"] == pytest.approx(sum((s - t) ** 2 for s, t in zip(new_o, PLACED, strict=True)) / 4)
    assert step["loss"]["new"] < step["loss"]["value"]


def test_the_step_after_the_nonlinearity_agrees_with_torch_and_its_sgd(figures):
    layer = nn.BatchNorm1d(1, dtype=torch.float64)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    a = torch.tensor(Z, dtype=torch.float64).sigmoid().unsqueeze(1)
    loss = nn.functional.mse_loss(layer(a).flatten(), torch.tensor(PLACED, dtype=torch.float64))
    loss.backward()
    optimizer.step()
    step = figures["after"]["step"]

    assert step["loss"]["value"] == pytest.approx(loss.item(), rel=TIGHT)
    assert step["gamma"]["gradient"] == pytest.approx(layer.weight.grad.item(), rel=TIGHT)
    assert step["beta"]["gradient"] == pytest.approx(layer.bias.grad.item(), rel=TIGHT)
    assert (step["gamma"]["new"], step["beta"]["new"]) == pytest.approx((layer.weight.item(), layer.bias.item()))


@pytest.mark.parametrize("placement", ["before", "after"])
def test_running_statistics_are_those_of_torch_after_as_many_batches(figures, placement):
    layer = nn.BatchNorm1d(1, dtype=torch.float64)
    x = torch.tensor(figures[placement]["input"], dtype=torch.float64).unsqueeze(1)
    for state, more in zip(figures[placement]["running"], (0, 1, 99), strict=True):
        for _ in range(more):
            layer.train()(x)
        assert state["batches"] == layer.num_batches_tracked.item()
        # 100 updates, each rounded to 1.1e-16, stay below 1e-12
        assert state["mean"] == pytest.approx(layer.running_mean.item(), rel=TIGHT)
        assert state["var"] == pytest.approx(layer.running_var.item(), rel=TIGHT)
        assert state["z_hat"] == pytest.approx(layer.eval()(x).flatten().tolist(), rel=TIGHT)


def test_one_row_gets_two_z_hat_in_two_batches_and_a_third_at_inference(example, figures):
    _, _, other = normalized(Z[:3])
    mean, var, inside = normalized(Z)
    outside = (Z[0] - mean) / math.sqrt(var * 4 / 3 + 1e-5)

    assert figures["other_batch"]["rows"] == [1, 2, 3]
    assert figures["other_batch"]["z_hat"] == pytest.approx(other, rel=TIGHT)
    # after 100 batches 0.9^100 = 2.7e-5 of the start is left in the running statistics
    assert figures["before"]["running"][-1]["z_hat"][0] == pytest.approx(outside, abs=1e-4)
    table = [line.split()[-1] for line in section(str(example), 6)[-3:]]
    assert table == [f"{inside[0]:.4f}", f"{other[0]:.4f}", f"{figures['before']['running'][-1]['z_hat'][0]:.4f}"]
    assert len(set(table)) == 3


def test_a_layer_keeps_four_numbers_per_neuron_two_of_them_learned(example, figures):
    assert figures["kept"] == {
        "learned": ["weight", "bias"],
        "not_learned": ["running_mean", "running_var"],
        "numbers_per_neuron": 4,
    }
    assert "4 numbers per neuron" in str(example)


def test_no_z_hat_passes_the_bound_and_the_text_says_so(example, figures):
    assert figures["bound"] == math.sqrt(3)
    assert max(map(abs, figures["before"]["z_hat"])) < figures["bound"]
    assert "|z_hat| <= sqrt(m-1), which is 1.7321 for m = 4" in " ".join(str(example).split())


def test_assumed_cells_are_marked_in_text_and_json(example, figures):
    rows = {line.split()[0]: line.split()[1:] for line in section(str(example), 1) if line[2:3].isdigit()}

    assert rows == {
        "1": ["8.9", "100", "1", "2.9"],
        "2": ["6.2", "89", "0", "-0.9"],
        "3": ["9.1", "91?", "0", "2.2"],
        "4": ["7.7", "76", "1?", "-0.7"],
    }
    assert "? marks an assumption, not a known value: iq of row 3, placed of row 4." in " ".join(str(example).split())
    assert "t is assumed in row 4" in " ".join(section(str(example), 4))
    assert [row["assumed"] for row in figures["rows"]] == [[], [], ["iq"], ["placed"]]


def test_known_data_carry_no_question_mark():
    example = worked_example(MiniBatch(("cgpa", "iq"), FEATURES, "placed", PLACED))

    assert section(str(example), 1)[3:5] == [
        "  row   cgpa    iq   placed    z11",
        "  1      8.9   100        1    2.9",
    ]
    assert "?" not in str(example)
    assert "assum" not in str(example)


def test_without_a_target_the_step_is_left_out_and_the_text_says_why():
    example = worked_example(MiniBatch(("cgpa", "iq"), FEATURES))

    assert example.target is None
    assert example.before.step is example.after.step is None
    assert "No target was given, so there is no loss" in str(example)


@pytest.mark.parametrize(
    ("activation", "g"),
    [("identity", lambda v: v), ("relu", lambda v: max(v, 0.0)), ("tanh", math.tanh), ("sigmoid", sigmoid)],
)
def test_the_activation_chosen_is_used_in_both_placements(activation, g):
    example = worked_example(activation=activation)

    assert example.before.output == pytest.approx([g(v) for v in normalized(Z)[2]], rel=TIGHT)
    assert example.after.input == pytest.approx([g(v) for v in Z], rel=TIGHT)
    assert f"y -> {activation}(y)" in str(example)


def test_weights_bias_and_learning_rate_given_are_used():
    example = worked_example(weights=(2.0, -0.5), bias=30.0, learning_rate=0.3)
    step = example.before.step.gamma

    assert example.neuron.z == pytest.approx([2 * c - 0.5 * i + 30 for c, i in FEATURES], rel=TIGHT)
    assert step.new == pytest.approx(1 - 0.3 * step.gradient, rel=TIGHT)
    assert "= 2 * cgpa - 0.5 * iq + 30" in str(example)
    assert "our choice" not in str(example)
    assert "our choice" in str(worked_example())


def test_weights_chosen_for_other_data_bring_both_features_to_one_scale():
    example = worked_example(MiniBatch(("pay", "same"), [(41000.0, 5.0), (52000.0, 5.0), (75000.0, 5.0)]))
    neuron = example.neuron

    assert neuron.weights == [1e-4, 1.0]
    assert neuron.bias == -10.0
    assert neuron.feature_sd == pytest.approx([math.sqrt(normalized([41000.0, 52000.0, 75000.0])[1]), 0.0])


@pytest.mark.parametrize(
    ("features", "target"),
    [
        ([(-1e-8, 1e12), (3e-8, -2e12), (4e-8, 7e12)], [1e9, -1e9, 3.0]),
        ([(123456.7, 0.1), (-123456.7, 0.2), (9e5, 0.3), (1.0, 0.4), (2.0, 0.5)], [12345678.9, 0.0, 1.0, 2.0, -5.0]),
        ([(1.0, 1.0)] * 3, None),
    ],
)
@pytest.mark.parametrize("activation", ["sigmoid", "identity"])
def test_no_line_of_the_text_is_wider_than_80_columns(features, target, activation):
    batch = MiniBatch(
        ("semester_marks_in_per_cent", "the_intelligence_quotient"),
        features,
        "placed_in_the_first_year",
        target,
        frozenset({(1, "semester_marks_in_per_cent"), (2, "the_intelligence_quotient")}),
    )
    for weights in (None, (-1.23456789e-5, -9.87654321e-7)):
        lines = str(worked_example(batch, weights=weights, activation=activation)).splitlines()
        assert max(map(len, lines)) <= 80
    assert max(map(len, str(worked_example()).splitlines())) <= 80


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (MiniBatch(("a", "b"), FEATURES[:2]), "must have at least 3 rows; got 2"),
        (MiniBatch(("a", "b"), [(1.0, 2.0, 3.0)] * 3), r"each row must have 2 features; got \[3, 3, 3\]"),
        (MiniBatch(("a", "b"), FEATURES, "t", [1.0]), "one number for each of the 4 rows; got 1"),
        (MiniBatch(("a", "b"), [*FEATURES, (math.nan, 1.0)]), "a, b must be finite numbers; got .*nan"),
        (MiniBatch(("a", "b"), FEATURES, "t", [1.0, 0.0, 0.0, math.inf]), "t must be finite numbers; got .*inf"),
        (
            MiniBatch(("a", "b"), [*FEATURES, (1e200, 1.0)]),
            "a, b must be numbers whose squares are finite; got .*1e.200",
        ),
        (MiniBatch(("a", "b"), FEATURES, "t", [1.0, 0.0, 0.0, 1e200]), "t must be numbers whose squares are finite"),
        (MiniBatch(("a", "b"), FEATURES, assumed=frozenset({(5, "a")})), "rows 1 to 4 of a, b; got a of 5"),
        (MiniBatch(("a", "b"), FEATURES, assumed=frozenset({(1, "target")})), "of a, b; got target of 1"),
    ],
)
def test_rows_that_can_not_be_used_are_named(batch, message):
    with pytest.raises(DataError, match=message):
        worked_example(batch)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"activation": "softmax"}, "activation must be one of .*; got 'softmax'"),
        ({"weights": (1.0,)}, r"weights must be 2 finite numbers; got \(1.0,\)"),
        ({"weights": (1.0, math.inf)}, "weights must be 2 finite numbers"),
        ({"bias": math.nan}, "bias must be finite; got nan"),
        ({"learning_rate": 0.0}, "learning_rate must be positive and finite; got 0.0"),
    ],
)
def test_options_that_can_not_be_used_are_named(options, message):
    with pytest.raises(InputError, match=message):
        worked_example(**options)


def keys_of(figures):
    """Return every key, at any depth."""
    if isinstance(figures, dict):
        return set(figures).union(*map(keys_of, figures.values()))
    return set().union(*map(keys_of, figures)) if isinstance(figures, list) else set()


def test_an_example_is_a_report(example, figures):
    assert repr(example) == "WorkedExample(sigmoid of cgpa and iq, 4 rows)"
    assert example.to_dict() == figures
    assert example.frame()["z_hat_before"].to_list() == figures["before"]["z_hat"]
    assert example._repr_html_().startswith("<pre>Batch normalization of one neuron")


def test_the_documentation_shows_this_text_and_names_every_key(example, figures):
    page = (ROOT / "docs/explain.md").read_text(encoding="utf-8")

    assert f"```text\n{example}\n```" in page
    assert {key for key in keys_of(figures) if f"`{key}`" not in page} == set()
