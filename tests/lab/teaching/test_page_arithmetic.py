"""The arithmetic of the explain page, compared with the library's layer."""

import math

import numpy as np
import pytest
import torch

import batchnorm as bn
from batchnorm.lab.teaching.worked_example import MiniBatch, worked_example
from explain_support import FUNCTIONS, layer_of, neuron

pytestmark = pytest.mark.browser

UNIT = 2.0**-53  # the rounding of one operation in float64


def calculated(window, cases):
    """Return the results of the page's function for the cases."""
    return window.page.evaluate("(cases) => cases.map(calculate)", cases)


def random_cases(number=300):
    generator = np.random.default_rng(0)

    def scale(low, high):
        return float(10 ** generator.uniform(low, high))

    cases = []
    for n in range(number):
        rows = int(generator.integers(2, 9))
        features = generator.normal(size=(rows, 2)) * [scale(-2, 4), scale(-2, 4)] + [scale(-2, 4), -scale(-2, 4)]
        cases.append(
            {
                "features": features.tolist(),
                "weights": (generator.normal(size=2) * scale(-3, 1)).tolist(),
                "bias": float(generator.normal() * scale(-1, 2)),
                "gamma": float(generator.normal()),
                "beta": float(generator.normal()),
                "eps": scale(-10, 0),
                "momentum": float(generator.uniform(0, 0.9)) if n % 3 else 0.1,  # from 0.9 the layer warns
                "activation": list(FUNCTIONS)[n % 4],
                "batches": int(generator.integers(0, 60)),
                "single": generator.normal(size=2).tolist(),
            }
        )
    return cases


def within(value, wanted, bound):
    assert np.all(np.abs(np.asarray(value) - np.asarray(wanted)) <= bound), (value, wanted, bound)


@pytest.mark.parametrize("placement", ["before", "after"])
@torch.no_grad()
def test_the_page_calculates_the_same_as_the_librarys_layer(window, placement):
    cases = random_cases()
    for case, found in zip(cases, calculated(window, cases), strict=True):
        z = [neuron(case, row) for row in case["features"]]
        assert found["z"] == z
        x = torch.tensor(z, dtype=torch.float64).unsqueeze(1)
        single = torch.tensor([[neuron(case, case["single"])]], dtype=torch.float64)
        if placement == "after":
            x, single = FUNCTIONS[case["activation"]](x), FUNCTIONS[case["activation"]](single)
        layer, page = layer_of(case, placement), found[placement]
        explanation = bn.explain(layer, x)
        training = explanation.training
        # Up to 8 values are summed twice and centered, each rounding by UNIT of the largest, and the two libraries'
        # nonlinearities differ by a few UNIT: x - mu is within d. That moves s = sqrt(var + eps) by d + 8 UNIT s,
        # so z_hat by (d / s + 8 UNIT)(1 + |z_hat|), and y by gamma times that, and the rounding of y.
        size, m = x.abs().max().item(), len(z)
        d, s = 16 * UNIT * size, math.sqrt(training.var.item() + case["eps"])
        hat = (d / s + 8 * UNIT) * (1 + math.sqrt(m - 1))
        y = abs(case["gamma"]) * hat + 4 * UNIT * (abs(case["gamma"]) * math.sqrt(m - 1) + abs(case["beta"]) + 1)
        within(page["mean"], training.mean.item(), d)
        within(page["var"], training.var.item(), 2 * d * training.sd.item() + d * d + 8 * UNIT * training.var.item())
        within(page["zHat"], training.z_hat.flatten(), hat)
        within(page["y"], training.y.flatten(), y)
        within(page["output"], training.output.flatten(), y + 4 * UNIT)  # no g is steeper than 1
        assert found["bound"] == explanation.bound

        for _ in range(case["batches"]):
            layer(x)
        after = bn.explain(layer, x).inference
        # An update rounds by 3 UNIT of the larger number and passes on what was there at most whole: n + 1 of them.
        steps = 3 * UNIT * (case["batches"] + 1)
        mean_off = d + steps * max(size, 1)
        batch_off = 4 * d * training.sd.item() + 2 * d * d + 16 * UNIT * training.var.item()
        var_off = batch_off + steps * max(explanation.unbiased_var.item(), 1)
        within(page["running"]["mean"], layer.running_mean.item(), mean_off)
        within(page["running"]["var"], layer.running_var.item(), var_off)
        everyone = torch.cat([x, single])
        alone = bn.explain(layer, everyone).inference
        s = math.sqrt(after.var.item() + case["eps"])
        far = alone.z_hat.abs().max().item()
        hat = (16 * UNIT * everyone.abs().max().item() + mean_off) / s + far * (var_off / s**2 + 8 * UNIT)
        y = abs(case["gamma"]) * hat + 4 * UNIT * (abs(case["gamma"]) * far + abs(case["beta"]) + 1)
        within([*page["inference"]["zHat"], page["single"]["zHat"]], alone.z_hat.flatten(), hat)
        within([*page["inference"]["y"], page["single"]["y"]], alone.y.flatten(), y)
        within([*page["inference"]["output"], page["single"]["output"]], alone.output.flatten(), y + 4 * UNIT)


def test_the_bounds_tell_a_biased_from_an_unbiased_variance(window):
    cases = random_cases()
    tight = [
        case
        for case, found in zip(cases, calculated(window, cases), strict=True)
        if max(map(abs, found["z"])) * UNIT * 16 / math.sqrt(found["before"]["var"] + case["eps"]) < 1e-11
    ]
    assert len(tight) > 0.9 * len(cases)


@pytest.mark.parametrize("value", [0.1, 1e7 / 3, -123456.789])
def test_rows_that_are_all_the_same_give_exactly_beta(window, value):
    case = random_cases(1)[0] | {"features": [[value, 2 * value]] * 3, "weights": [0.3, 0.7], "eps": 1e-10}
    (found,) = calculated(window, [case])
    for placement in ("before", "after"):
        x = torch.tensor(found[placement]["input"], dtype=torch.float64).unsqueeze(1)
        assert found[placement]["var"] == 0
        assert found[placement]["zHat"] == [0, 0, 0]
        assert found[placement]["y"] == bn.explain(layer_of(case, placement), x).training.y.flatten().tolist()
        assert found[placement]["y"] == [case["beta"]] * 3


def test_a_constant_column_leaves_the_other_columns_z_hat(window):
    case = random_cases(1)[0] | {"features": [[1.5, 4.0], [2.5, 4.0], [7.0, 4.0]], "weights": [1.0, 0.5], "bias": -3.0}
    (found,) = calculated(window, [case])
    x = torch.tensor([[1.5], [2.5], [7.0]], dtype=torch.float64)
    assert found["before"]["zHat"] == pytest.approx(
        bn.explain(layer_of(case, "before"), x).training.z_hat.flatten().tolist(), rel=1e-14
    )


@pytest.mark.parametrize("activation", FUNCTIONS)
def test_the_gradient_step_is_that_of_the_worked_example(window, activation):
    generator = np.random.default_rng(1)
    cases, wanted = [], []
    for _ in range(20):
        features = generator.normal(size=(4, 2)).tolist()
        target = generator.integers(0, 2, size=4).astype(float).tolist()
        weights, bias = tuple(generator.normal(size=2).tolist()), float(generator.normal())
        batch = MiniBatch(("a", "b"), features, "t", target)
        wanted.append(worked_example(batch, weights=weights, bias=bias, activation=activation))
        cases.append({
            "features": features, "target": target, "weights": list(weights), "bias": bias, "activation": activation,
            "gamma": 1.0, "beta": 0.0, "eps": 1e-5, "momentum": 0.1, "batches": 0, "learningRate": 0.1,
        })  # fmt: skip
    for example, found in zip(wanted, calculated(window, cases), strict=True):
        for placement, layer in (("before", example.before), ("after", example.after)):
            step = found[placement]["step"]
            numbers = [step["gradient"]["gamma"], step["next"]["gamma"], step["gradient"]["beta"], step["next"]["beta"]]
            gamma, beta, loss = layer.step.gamma, layer.step.beta, layer.step.loss
            # numbers near 1 with a standard deviation above 0.01: a few dozen roundings stay below 1e-12
            assert [*numbers, step["loss"], step["newLoss"]] == pytest.approx(
                [gamma.gradient, gamma.new, beta.gradient, beta.new, loss.value, loss.new], abs=1e-12
            )
