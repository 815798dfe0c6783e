"""The page of `batchnorm explain --html`: its arithmetic, what it shows, and how it is used."""

import contextlib
import io
import json
import math
import os
import re
import resource
import signal
import subprocess
import sys
import tempfile
from itertools import pairwise
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch

import batchnorm as bn
from batchnorm.cli import main
from batchnorm.lab.teaching.explain_page import page_data, write_page
from batchnorm.lab.teaching.worked_example import NOTES, MiniBatch, worked_example

NASTY = "</script><img src=x onerror=alert(1)>"
LONG = "the_intelligence_quotient_measured_in_the_first_year"
MINUS = "\u2212"
UNIT = 2.0**-53  # the rounding of one operation in float64
FUNCTIONS = {"identity": lambda v: v, "sigmoid": torch.sigmoid, "tanh": torch.tanh, "relu": torch.relu}


class Visit:
    """The page, open in a browser, and what went wrong or out of it."""

    def __init__(self, browser, path, *, width=1440, **options):
        self.context = browser.new_context(viewport={"width": width, "height": 900}, **options)
        self.page = self.context.new_page()
        self.complaints, self.requests = [], []
        self.page.on("console", lambda message: self.complaints.append(message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("dialog", lambda dialog: (self.complaints.append(dialog.message), dialog.dismiss()))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.open(path)

    def open(self, path):
        """Load the page afresh."""
        self.complaints.clear()
        self.requests.clear()
        self.page.goto(path.as_uri())

    def wait(self, expression):
        """Until the expression holds in the page, whose policy forbids Playwright's own way of waiting."""
        for _ in range(400):
            if self.page.evaluate(expression):
                return
            self.page.wait_for_timeout(25)
        pytest.fail(f"waited in vain for {expression}")

    def text(self, key):
        """What the page shows under a key, in the keyboard's own characters."""
        return self.page.text_content(f"[data-out='{key}']").replace(MINUS, "-").replace("\u00a0", " ")

    def number(self, key):
        return float(self.text(key))

    def numbers(self, key, count=4):
        return [self.number(f"{key}.{i}") for i in range(count)]

    def input(self, path):
        return self.page.locator(f"[id='{path}']")

    def type(self, path, text):
        """Put a text into a number's input as a keyboard does."""
        self.input(path).focus()
        self.page.keyboard.press("Control+a")
        self.page.keyboard.press("Backspace")
        self.page.keyboard.type(text)

    def problem(self, path):
        place = self.page.locator(f"[id='{path}-problem']")
        return place.text_content() if place.is_visible() else None

    def choose(self, key, value):
        self.page.locator(f"[data-choice={key}][data-value='{value}']:visible").first.click()

    def points(self):
        """Centres (x, y) of the four moving points of the strip."""
        return self.page.eval_on_selector_all(
            "#strip .point", "points => points.map((p) => [Number(p.getAttribute('cx')), Number(p.getAttribute('cy'))])"
        )

    def violations(self, axe_source):
        self.page.evaluate(axe_source)
        found = self.page.evaluate("axe.run()")["violations"]
        return [(v["id"], v["impact"], [node["target"] for node in v["nodes"]]) for v in found]


@pytest.fixture(scope="module")
def notes_page(tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "notes.html"
    write_page(worked_example(), path)
    return path


@pytest.fixture(scope="module")
def window(chromium, notes_page):
    window = Visit(chromium, notes_page)
    yield window
    window.context.close()


@pytest.fixture
def visit(window, notes_page):
    """A visit to the page of the notes' rows, on a wide screen."""
    window.open(notes_page)
    return window


@pytest.fixture
def open_page(chromium, tmp_path):
    """A visit to the page of another mini-batch, or in another kind of browser."""
    opened = []

    def open_it(batch=NOTES, *, activation="sigmoid", **options):
        path = tmp_path / "page.html"
        write_page(worked_example(batch, activation=activation), path)
        opened.append(Visit(chromium, path, **options))
        return opened[-1]

    yield open_it
    for visit in opened:
        visit.context.close()


# The page's arithmetic against the layer.


def calculated(window, cases):
    """What the page's function makes of the cases."""
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


def neuron(case, row):
    """z of a row, by the operations of the page in their order, so that both have it to the last bit."""
    return case["weights"][0] * row[0] + case["weights"][1] * row[1] + case["bias"]


def layer_of(case, place):
    activation = case["activation"] if place == "before" and case["activation"] != "identity" else None
    layer = bn.BatchNorm1d(1, case["eps"], case["momentum"], dtype=torch.float64, activation=activation)
    with torch.no_grad():
        layer.weight.fill_(case["gamma"])
        layer.bias.fill_(case["beta"])
    return layer


def within(value, wanted, bound):
    assert np.all(np.abs(np.asarray(value) - np.asarray(wanted)) <= bound), (value, wanted, bound)


@pytest.mark.parametrize("place", ["before", "after"])
@torch.no_grad()
def test_the_page_calculates_what_the_librarys_layer_does(window, place):
    cases = random_cases()
    for case, found in zip(cases, calculated(window, cases), strict=True):
        z = [neuron(case, row) for row in case["features"]]
        assert found["z"] == z
        x = torch.tensor(z, dtype=torch.float64).unsqueeze(1)
        single = torch.tensor([[neuron(case, case["single"])]], dtype=torch.float64)
        if place == "after":
            x, single = FUNCTIONS[case["activation"]](x), FUNCTIONS[case["activation"]](single)
        layer, page = layer_of(case, place), found[place]
        explanation = bn.explain(layer, x)
        training = explanation.training
        # Up to 8 values are summed twice and centred, each rounding by UNIT of the largest, and the two libraries'
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


def test_the_bounds_of_the_random_cases_are_tight_enough_to_tell_a_biased_from_an_unbiased_variance(window):
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
    for place in ("before", "after"):
        x = torch.tensor(found[place]["input"], dtype=torch.float64).unsqueeze(1)
        assert found[place]["var"] == 0
        assert found[place]["zHat"] == [0, 0, 0]
        assert found[place]["y"] == bn.explain(layer_of(case, place), x).training.y.flatten().tolist()
        assert found[place]["y"] == [case["beta"]] * 3


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
        wanted.append(worked_example(batch, weights=weights, bias=bias, activation=activation).figures)
        cases.append({
            "features": features, "target": target, "weights": list(weights), "bias": bias, "activation": activation,
            "gamma": 1.0, "beta": 0.0, "eps": 1e-5, "momentum": 0.1, "batches": 0, "learningRate": 0.1,
        })  # fmt: skip
    for figures, found in zip(wanted, calculated(window, cases), strict=True):
        for place in ("before", "after"):
            step = found[place]["step"]
            numbers = [step["gradient"]["gamma"], step["next"]["gamma"], step["gradient"]["beta"], step["next"]["beta"]]
            gamma, beta, loss = (figures[place]["step"][name] for name in ("gamma", "beta", "loss"))
            # numbers near 1 with a standard deviation above 0.01: a few dozen roundings stay below 1e-12
            assert [*numbers, step["loss"], step["newLoss"]] == pytest.approx(
                [gamma["gradient"], gamma["new"], beta["gradient"], beta["new"], loss["value"], loss["new"]], abs=1e-12
            )


# What is shown.


def test_the_numbers_shown_at_the_start_are_those_that_the_command_prints(visit):
    figures = worked_example().figures
    printed = worked_example().text()
    for place in ("before", "after"):
        for key, name in (("mean", "mean"), ("var", "var"), ("sd", "sd")):
            assert visit.number(f"{place}.{key}") == pytest.approx(figures[place][name], abs=5e-5)
            assert visit.text(f"{place}.{key}") in printed
        for key, name in (("zHat", "z_hat"), ("y", "y")):
            assert visit.numbers(f"{place}.{key}") == pytest.approx(figures[place][name], abs=5e-5)
            assert all(visit.text(f"{place}.{key}.{i}") in printed for i in range(4))
    assert visit.numbers("before.output") == pytest.approx(figures["before"]["output"], abs=5e-6)
    assert visit.numbers("after.input") == pytest.approx(figures["after"]["input"], abs=5e-6)


def test_formulas_are_shown_with_their_numbers_in_place(visit):
    assert visit.text("z.sum.0") == "1 · 8.9 + 0.1 · 100 - 16"
    assert visit.text("before.mean.sum") == "(2.9 - 0.9 + 2.2 - 0.7) / 4"
    assert visit.text("before.var.sum") == "(2.025² + (-1.775)² + 1.325² + (-1.575)²) / 4"
    assert visit.text("before.zHat.sum.1") == "(-0.9 - 0.875) / √(2.8719 + 0.00001)"
    assert visit.text("before.y.sum.1") == "1 · (-1.0474) + 0"
    assert visit.text("before.output.sum.0") == "sigmoid(1.1949)"
    assert visit.text("after.input.sum.1") == "sigmoid(-0.9)"


def test_assumed_cells_are_marked_wherever_they_are_shown_until_they_are_changed(visit):
    assert visit.page.locator("[data-mark]:visible").count() == 2
    assert visit.text("z.sum.2") == "1 · 9.1 + 0.1 · 91? - 16"
    assert visit.text("assumed") == "iq of row 3, placed of row 4"
    assert visit.text("step.assumed") == " t is assumed in row 4."
    assert visit.input("features.2.1").get_attribute("aria-label") == "iq of row 3, assumed"
    visit.choose("swapped", 2)
    assert "iq 91?" in visit.text("swap.caption")
    visit.type("features.2.1", "97")
    assert visit.text("z.sum.2") == "1 · 9.1 + 0.1 · 97 - 16"
    assert visit.text("assumed") == "placed of row 4"
    assert visit.input("features.2.1").get_attribute("aria-label") == "iq of row 3"
    visit.type("target.3", "0")
    assert visit.page.locator("#assumptions").is_hidden()
    assert visit.page.locator("[data-mark]:visible").count() == 0


def test_known_data_carry_no_question_mark(open_page):
    visit = open_page(MiniBatch(("cgpa", "iq"), NOTES.features, "placed", NOTES.target))
    assert "?" not in visit.page.inner_text("body")


def test_without_a_target_there_is_no_step_and_no_column(open_page):
    visit = open_page(MiniBatch(("cgpa", "iq"), NOTES.features))
    assert visit.page.locator("#step").count() == visit.page.locator("[id^='target.']").count() == 0
    assert visit.numbers("z") == [2.9, -0.9, 2.2, -0.7]
    assert visit.complaints == []


def test_names_from_the_users_file_are_shown_as_text_and_never_run(open_page):
    visit = open_page(MiniBatch((NASTY, LONG), NOTES.features, NASTY + "2", NOTES.target))
    visit.type("features.0.0", "")
    assert visit.page.locator("img").count() == 0
    assert visit.page.inner_text("body").count(NASTY) >= 4
    assert visit.page.evaluate("document.documentElement.scrollWidth") <= 1440
    assert visit.complaints == []


def test_the_page_is_under_150_kilobytes(notes_page):
    assert notes_page.stat().st_size < 150_000


def test_the_page_opens_without_a_complaint_and_asks_no_host_for_anything(visit, notes_page):
    assert visit.complaints == []
    assert [url for url in visit.requests if not url.startswith("data:")] == [notes_page.as_uri()]


def test_without_javascript_the_page_says_where_the_numbers_are(open_page):
    visit = open_page(java_script_enabled=False)
    assert "batchnorm explain prints the same numbers" in visit.page.inner_text("main")


# Sliders, cells and buttons, by mouse and by keyboard.


def expected(place="before", activation="sigmoid", features=NOTES.features, **changed):
    """What the library makes of the notes' rows with some numbers changed."""
    values = {"w1": 1.0, "w2": 0.1, "b": -16.0, "gamma": 1.0, "beta": 0.0, "eps": 1e-5} | changed
    case = values | {"weights": [values["w1"], values["w2"]], "bias": values["b"], "momentum": 0.1}
    case["activation"] = activation
    x = torch.tensor([[neuron(case, row)] for row in features], dtype=torch.float64)
    x = FUNCTIONS[activation](x) if place == "after" else x
    return bn.explain(layer_of(case, place), x)


def shows(visit, **changed):
    """Whether every number of both placements is the library's."""
    for place in ("before", "after"):
        training = expected(place, **changed).training
        assert visit.number(f"{place}.mean") == pytest.approx(training.mean.item(), abs=1e-4, rel=5e-5)
        assert visit.number(f"{place}.sd") == pytest.approx(training.sd.item(), abs=1e-4)
        assert visit.numbers(f"{place}.zHat") == pytest.approx(training.z_hat.flatten().tolist(), abs=1e-4)
        assert visit.numbers(f"{place}.y") == pytest.approx(training.y.flatten().tolist(), abs=1e-4)
        assert visit.numbers(f"now.{place}.zHat") == visit.numbers(f"{place}.zHat")
    output = expected("before", **changed).training.output.flatten().tolist()
    assert visit.numbers("before.output") == pytest.approx(output, abs=1e-4)


SLIDERS = {slider.key: slider for slider in page_data(worked_example()).sliders}


@pytest.mark.parametrize("width", [360, 1440])
@pytest.mark.parametrize("key", SLIDERS)
def test_arrow_keys_move_a_slider_and_every_number_follows(open_page, key, width):
    visit, slider = open_page(width=width), SLIDERS[key]
    visit.page.evaluate("document.getElementById('panel').open = true")
    visit.page.locator(f"[data-slides={key}]").focus()
    for _ in range(3):
        visit.page.keyboard.press("ArrowRight")
    value = slider.value * 10 ** (3 * slider.step) if slider.power else slider.value + 3 * slider.step
    assert float(visit.input(key).input_value()) == pytest.approx(value, rel=2e-3)  # eps goes to 3 digits
    shows(visit, **{key: float(visit.input(key).input_value())})
    assert visit.complaints == []


@pytest.mark.parametrize("width", [360, 1440])
def test_a_slider_follows_the_mouse(open_page, width):
    visit = open_page(width=width)
    visit.page.evaluate("document.getElementById('panel').open = true")
    box = visit.page.locator("[data-slides=gamma]").bounding_box()
    visit.page.mouse.move(box["x"] + box["width"] * 0.5, box["y"] + box["height"] / 2)
    visit.page.mouse.down()
    visit.page.mouse.move(box["x"] + box["width"] * 0.9, box["y"] + box["height"] / 2, steps=4)
    visit.page.mouse.up()
    gamma = float(visit.input("gamma").input_value())
    assert 2 < gamma < 3
    shows(visit, gamma=gamma)


@pytest.mark.parametrize(("key", "text"), [("w1", "0.123"), ("b", "250"), ("gamma", "-7.5"), ("eps", "0.5")])
def test_a_number_typed_beside_a_slider_counts_as_it_is_and_may_lie_beyond_it(visit, key, text):
    visit.type(key, text)
    shows(visit, **{key: float(text)})
    assert visit.input(key).input_value() == text


@pytest.mark.parametrize("activation", FUNCTIONS)
def test_another_nonlinearity_changes_both_placements_and_its_formula(visit, activation):
    visit.page.select_option("#activation", activation)
    shows(visit, activation=activation)
    assert visit.text("g.formula").startswith(f"{activation}(v) =")
    assert visit.text("before.output.sum.0").startswith(f"{activation}(")


def test_the_page_starts_with_the_nonlinearity_asked_for(open_page):
    visit = open_page(activation="tanh")
    assert visit.page.input_value("#activation") == "tanh"
    shows(visit, activation="tanh")


def test_a_row_that_is_edited_changes_every_number(visit):
    visit.type("features.1.0", "9.75")
    visit.type("features.3.1", "120")
    rows = [(8.9, 100), (9.75, 89), (9.1, 91), (7.7, 120)]
    assert visit.numbers("z") == pytest.approx([row[0] + 0.1 * row[1] - 16 for row in rows], abs=1e-4)
    shows(visit, features=rows)


@pytest.mark.parametrize(
    ("path", "text", "message"),
    [
        ("features.0.1", "", "Must be a number; it is empty. The figures keep 100."),
        ("features.2.0", "-", "Must be a number; this is none. The figures keep 9.1."),
        ("gamma", "e", "Must be a number; this is none. The figures keep 1."),
        ("eps", "0", "Must be above 0; got 0. The figures keep 0.00001."),
        (
            "features.1.1",
            "1e200",
            "Must be nearer 0: with 1e+200 the figures are too large to calculate. They keep 89.",
        ),
        ("batches", "1.5", "Must be a whole number from 0 to 10000; got 1.5. The figures keep 1."),
        ("neurons", "0", "Must be a whole number from 1 to 1000000000; got 0. The figures keep 100."),
        ("single.0", "", "Must be a number; it is empty. The figures keep 9.1."),
        ("other.1", "", "Must be a number; it is empty. The figures keep 80."),
    ],
)
def test_an_edit_that_can_not_be_used_is_named_beside_it_and_the_last_good_figures_stay(visit, path, text, message):
    keep = visit.input(path).input_value()
    before = visit.page.eval_on_selector_all("[data-out]", "all => all.map((e) => e.textContent)")
    if text != "":  # a last character that is still a number would be taken
        visit.page.evaluate("(path) => { document.getElementById(path).value = ''; }", path)
        visit.input(path).focus()
        visit.page.keyboard.insert_text(text)
    else:
        visit.input(path).focus()
        visit.page.keyboard.press("Control+a")
        visit.page.keyboard.press("Backspace")
    assert visit.problem(path) == message
    assert visit.input(path).get_attribute("aria-invalid") == "true"
    assert visit.page.eval_on_selector_all("[data-out]", "all => all.map((e) => e.textContent)") == before
    assert visit.complaints == []
    visit.type(path, keep)
    assert visit.problem(path) is None
    assert visit.input(path).get_attribute("aria-invalid") is None


def test_a_wrong_cell_stays_wrong_while_other_numbers_move(visit):
    visit.type("features.0.0", "")
    visit.type("b", "-15")
    assert visit.problem("features.0.0") is not None
    assert visit.input("features.0.0").input_value() == ""
    assert visit.numbers("z") == [3.9, 0.1, 3.2, 0.3]


def test_reset_brings_everything_back(visit):
    before = visit.page.eval_on_selector_all("[data-out]", "all => all.map((e) => e.textContent)")
    values = visit.page.eval_on_selector_all("input, select", "all => all.map((e) => e.value)")
    visit.type("features.0.0", "")
    visit.type("features.1.0", "3")
    visit.type("beta", "2")
    visit.page.select_option("#activation", "relu")
    visit.choose("placement", "after")
    visit.choose("stage", 1)
    visit.choose("swapped", 0)
    visit.choose("other", "outlier")
    visit.page.click("#reset")
    assert visit.page.eval_on_selector_all("[data-out]", "all => all.map((e) => e.textContent)") == before
    assert visit.page.eval_on_selector_all("input, select", "all => all.map((e) => e.value)") == values
    assert visit.page.locator(".problem:visible").count() == 0


@pytest.mark.parametrize("color_scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1440])
def test_every_control_is_reached_and_worked_by_keyboard_without_a_complaint(open_page, width, color_scheme):
    visit = open_page(width=width, color_scheme=color_scheme)
    visit.page.evaluate("document.getElementById('panel').open = true")
    controls = "input, select, button, summary"
    wanted = visit.page.locator(f"{controls} >> visible=true").count()
    reached = set()
    for _ in range(wanted + 20):
        visit.page.keyboard.press("Tab")
        number, kind = visit.page.evaluate(
            f"[[...document.querySelectorAll('{controls}')].indexOf(document.activeElement),"
            " document.activeElement.tagName + (document.activeElement.type || '')]"
        )
        if number >= 0 and number not in reached:
            reached.add(number)
            visit.page.keyboard.press("Space" if kind.startswith("BUTTON") else "ArrowUp")
    assert len(reached) == wanted
    assert visit.complaints == []


# The strip.


def test_the_points_move_from_raw_to_normalised_to_scaled_and_shifted(visit):
    visit.type("gamma", "2")
    visit.type("beta", "0.5")
    training = expected(gamma=2.0, beta=0.5)
    wanted = [training.z, training.training.z_hat, training.training.y]
    drawn = []
    for stage in range(3):
        visit.choose("stage", stage)
        drawn.append(visit.points())
    values = [v for line in wanted for v in line.flatten().tolist()]
    places = [x for line in drawn for x, _ in line]
    slope, level = np.polyfit(values, places, 1)
    assert slope > 0
    assert places == pytest.approx([slope * v + level for v in values], abs=0.02)  # drawn to 0.01 pixels
    lines = [max(y for _, y in line) for line in drawn]
    assert lines == sorted(set(lines))


def test_the_stage_slider_moves_the_points_between_by_arrow_keys(visit):
    visit.page.focus("#stage-slider")
    for _ in range(10):
        visit.page.keyboard.press("ArrowRight")
    assert visit.text("stage") == "50% from raw to normalised"
    assert visit.page.get_attribute("#stage-slider", "aria-valuetext") == "50% from raw to normalised"
    between = visit.points()
    ends = []
    for stage in (0, 1):
        visit.choose("stage", stage)
        ends.append(visit.points())
    assert np.array(between) == pytest.approx((np.array(ends[0]) + np.array(ends[1])) / 2, abs=0.02)


def test_play_moves_the_points_through_all_stages(visit):
    visit.page.click("#play")
    visit.wait("document.querySelector('[data-out=stage]').textContent.includes('% from raw')")
    visit.wait("document.querySelector('[data-out=stage]').textContent === 'scaled and shifted'")
    visit.wait("document.getElementById('play').textContent === 'Play'")
    assert visit.complaints == []


def test_where_less_motion_is_wanted_the_points_are_only_ever_on_a_line(open_page):
    visit = open_page(reduced_motion="reduce")
    visit.page.evaluate(
        "window.seen = new Set(); new MutationObserver(() => window.seen.add("
        "document.querySelector('[data-out=stage]').textContent))"
        ".observe(document.querySelector('[data-out=stage]'), { childList: true, characterData: true, subtree: true })"
    )
    visit.page.click("#play")
    visit.wait("document.querySelector('[data-out=stage]').textContent === 'scaled and shifted'")
    assert set(visit.page.evaluate("[...window.seen]")) == {"normalised", "scaled and shifted"}


def test_points_in_one_place_do_not_hide_each_other(open_page):
    visit = open_page(MiniBatch(("a", "b"), [(5.0, 1.0)] * 4))
    points = visit.points()
    assert len({x for x, _ in points}) == 1
    heights = sorted(y for _, y in points)
    assert min(b - a for a, b in pairwise(heights)) > 12
    assert visit.numbers("before.zHat") == [0, 0, 0, 0]


# Swap, inference, four numbers.


@pytest.mark.parametrize("place", ["before", "after"])
def test_another_row_in_one_place_changes_every_z_hat(visit, place):
    visit.choose("placement", place)
    visit.choose("swapped", 1)
    visit.type("other.0", "5.9")
    visit.type("other.1", "106")
    rows = [NOTES.features[0], (5.9, 106), *NOTES.features[2:]]
    was, now = expected(place).training, expected(place, features=rows).training
    assert visit.numbers("swap.was") == pytest.approx(was.z_hat.flatten().tolist(), abs=1e-4)
    assert visit.numbers("swap.is") == pytest.approx(now.z_hat.flatten().tolist(), abs=1e-4)
    assert visit.numbers("swap.change") == pytest.approx((now.z_hat - was.z_hat).flatten().tolist(), abs=1e-4)
    assert visit.number("swap.change.mean") == pytest.approx((now.mean - was.mean).item(), abs=1e-4)
    assert visit.number("swap.change.sd") == pytest.approx((now.sd - was.sd).item(), abs=1e-4)
    assert visit.text("swap.says").startswith("All 3 rows that stayed have another ẑ")
    assert "Row 2 (cgpa 6.2, iq 89) swapped for cgpa 5.9, iq 106" in visit.text("swap.caption")


def test_a_row_swapped_for_itself_changes_nothing_and_that_is_said(visit):
    visit.choose("other", "same")
    assert visit.numbers("swap.change") == [0, 0, 0, 0]
    assert "leaves the mean and the variance as they were" in visit.text("swap.says")


def test_an_outlier_lies_four_standard_deviations_below_the_mean(visit):
    visit.choose("other", "outlier")
    x = np.array(NOTES.features)
    wanted = x.mean(axis=0) - 4 * x.std(axis=0)
    found = [float(visit.input(f"other.{j}").input_value()) for j in range(2)]
    assert found == pytest.approx(wanted.tolist(), abs=0.5)
    assert visit.number("swap.is.3") < -1.5


@pytest.mark.parametrize("place", ["before", "after"])
@torch.no_grad()
def test_inference_uses_the_running_statistics_after_as_many_batches(visit, place):
    visit.choose("placement", place)
    visit.page.focus("#batches-slider")
    for _ in range(4):
        visit.page.keyboard.press("ArrowRight")
    start = expected(place)
    layer = bn.BatchNorm1d(1, dtype=torch.float64)
    for _ in range(5):
        layer(start.z)
    inference = bn.explain(layer, start.z).inference
    assert visit.input("batches").input_value() == "5"
    assert visit.number("running.mean") == pytest.approx(layer.running_mean.item(), abs=1e-4)
    assert visit.number("running.var") == pytest.approx(layer.running_var.item(), abs=1e-4)
    assert visit.numbers("inference.was") == pytest.approx(start.training.z_hat.flatten().tolist(), abs=1e-4)
    assert visit.numbers("inference.is") == pytest.approx(inference.z_hat.flatten().tolist(), abs=1e-4)
    assert visit.number("kept.mean") == visit.number("running.mean")
    assert visit.number("kept.var") == visit.number("running.var")


def test_before_the_first_batch_the_running_statistics_are_0_and_1(visit):
    visit.type("batches", "0")
    assert (visit.number("running.mean"), visit.number("running.var")) == (0, 1)
    assert visit.text("running.mean.sum") == "at the start"


@torch.no_grad()
def test_a_new_row_alone_is_calculated_at_inference(visit):
    visit.type("single.0", "6.8")
    visit.type("single.1", "123")
    layer = bn.BatchNorm1d(1, dtype=torch.float64, activation="sigmoid")
    layer(expected().z)
    alone = bn.explain(layer, torch.tensor([[3.1], [3.1]], dtype=torch.float64)).inference
    assert visit.number("single.input") == pytest.approx(3.1)
    assert visit.number("single.zHat") == pytest.approx(alone.z_hat[0].item(), abs=1e-4)
    assert visit.number("single.output") == pytest.approx(alone.output[0].item(), abs=1e-5)


def test_four_numbers_a_neuron_two_of_them_learned(visit):
    visit.type("neurons", "256")
    visit.type("gamma", "1.5")
    assert visit.text("kept.says").startswith("256 · 4 = 1024 numbers, 512 of them learned")
    assert visit.page.locator(".cards dd").count() == 4
    assert visit.number("kept.gamma") == 1.5
    assert "4 numbers a neuron" in visit.page.text_content("#kept")


def test_the_gradient_step_moves_gamma_and_beta_and_lowers_the_loss(visit):
    step = worked_example().figures["before"]["step"]
    loss = visit.number("step.loss")
    visit.page.click("#step")
    assert float(visit.input("gamma").input_value()) == pytest.approx(step["gamma"]["new"], rel=1e-8)
    assert float(visit.input("beta").input_value()) == pytest.approx(step["beta"]["new"], rel=1e-8)
    assert visit.number("step.loss") == pytest.approx(step["loss"]["new"], abs=1e-5)
    assert visit.number("step.loss") < loss


def test_the_bound_and_the_largest_z_hat_are_said(visit):
    said = visit.text("before.bound")
    assert "for m = 4 rows |ẑ| ≤ √(m - 1) = 1.7321. The largest here is 1.1949, of row 1." in said


# Accessibility, widths, print.


@pytest.mark.parametrize("color_scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1440])
def test_axe_finds_no_fault(open_page, axe_source, width, color_scheme):
    visit = open_page(width=width, color_scheme=color_scheme)
    assert visit.violations(axe_source) == []
    visit.page.evaluate("document.getElementById('panel').open = true")
    visit.type("features.0.0", "")
    visit.choose("swapped", 0)
    visit.page.locator("[data-choice=placement][data-value=after]:visible").last.click()
    assert visit.violations(axe_source) == []
    assert visit.complaints == []


def test_axe_sees_a_fault_where_there_is_one(visit, axe_source):
    visit.page.evaluate("document.querySelector('label[for=w1-slider]').remove()")
    visit.page.evaluate("document.getElementById('w1-slider').removeAttribute('title')")
    assert [found[0] for found in visit.violations(axe_source)] == ["label"]


def test_on_a_phone_the_sliders_start_folded_and_unfold_by_keyboard(open_page):
    visit = open_page(width=360)
    slider = visit.page.locator("[data-slides=w1]")
    assert slider.is_hidden()
    visit.page.focus("summary")
    visit.page.keyboard.press("Enter")
    assert slider.is_visible()


@pytest.mark.parametrize("width", [360, 1440])
@pytest.mark.parametrize("values", [(1.0, 1.0), (1e-9, 1e9), (123456.789, -0.00012345)])
def test_the_page_fits_its_width(open_page, width, values):
    rows = [(values[0] * (1 + i / 7), values[1] * (1 - i * i / 3)) for i in range(4)]
    visit = open_page(MiniBatch((LONG, "b"), rows, LONG + "2", [1.0, 0.0, 0.0, 1.0]), width=width)
    visit.type("features.0.0", "")
    visit.page.evaluate("document.getElementById('panel').open = true")
    assert visit.page.evaluate("document.documentElement.scrollWidth") == width
    strip = visit.page.locator("#strip").bounding_box()
    assert strip["x"] >= 0
    assert strip["x"] + strip["width"] <= width
    assert visit.complaints == []


def test_one_short_summary_is_announced_and_only_once_the_change_is_over(visit):
    assert visit.page.locator("[aria-live], [role=status], [role=alert], output").count() == 1
    visit.page.focus("[data-slides=b]")
    for _ in range(3):
        visit.page.keyboard.press("ArrowRight")
    assert visit.page.text_content("#said") == ""
    visit.wait("document.getElementById('said').textContent !== ''")
    assert visit.page.text_content("#said").replace(MINUS, "-") == (
        "Batch norm before the nonlinearity: mean 1.175, standard deviation 1.6947, "
        "normalised 1.1949, -1.0474, 0.7819, -0.9294."
    )


@pytest.mark.parametrize("width", [360, 794])
def test_in_print_are_all_numbers_and_no_controls(open_page, width):
    visit = open_page(width=width)
    visit.page.emulate_media(media="print")
    visit.wait("document.getElementById('panel').open")
    for key in ("w1", "w2", "b", "gamma", "beta", "eps", "features.2.1", "batches"):
        assert visit.input(key).is_visible()
    assert visit.page.locator("button:visible, nav:visible, [type=range]:visible").count() == 0
    assert visit.page.evaluate("document.documentElement.scrollWidth") == width
    assert visit.complaints == []


def test_print_is_dark_on_white_from_a_dark_screen_too(open_page):
    visit = open_page(color_scheme="dark")
    visit.page.emulate_media(media="print", color_scheme="dark")
    colours = visit.page.evaluate(
        "[getComputedStyle(document.body).color, getComputedStyle(document.body).backgroundColor]"
    )
    ink, paper = ([int(part) for part in re.findall(r"\d+", colour)] for colour in colours)
    assert max(ink) < 60
    assert min(paper) == 255


def test_a_small_table_of_three_rows_has_three_of_everything(open_page):
    visit = open_page(MiniBatch(("a", "b"), [(1.0, 9.0), (2.0, 4.0), (4.0, 5.0)]))
    assert len(visit.points()) == 3
    assert visit.page.locator("[data-choice=swapped]").count() == 3
    assert "for m = 3 rows" in visit.text("before.bound")


# The command.


def explain(*arguments, cwd, status=0):
    """Run `batchnorm explain` in a folder: what it prints, or the one sentence that it ends with."""
    out, err, before = io.StringIO(), io.StringIO(), sys.argv
    sys.argv = ["batchnorm", "explain", *map(str, arguments)]
    try:
        with (
            contextlib.chdir(cwd),
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
            pytest.raises(SystemExit) as ended,
        ):
            main()
    finally:
        sys.argv = before
    assert (ended.value.code or 0) == status, err.getvalue()
    if status == 0:
        return out.getvalue()
    assert out.getvalue() == ""
    (sentence,) = err.getvalue().splitlines()
    return sentence


def test_the_command_writes_the_page_and_says_where(tmp_path, notes_page):
    assert explain("--html", "page.html", cwd=tmp_path) == "Page: page.html\n"
    assert (tmp_path / "page.html").read_text() == notes_page.read_text()
    assert [path.name for path in tmp_path.iterdir()] == ["page.html"]


def test_with_json_the_page_is_written_and_json_is_all_that_is_printed(tmp_path):
    printed = explain("--html", "page.html", "--json", cwd=tmp_path)
    assert json.loads(printed) == worked_example().figures
    assert (tmp_path / "page.html").exists()


def test_a_table_of_the_users_gives_the_page_its_first_rows_names_and_nonlinearity(chromium, tmp_path):
    frame = pl.DataFrame({NASTY: [1.5, 2.0, 4.0, 3.5, 9.0], "iq": [9, 8, 5, 6, 1], "t": [1, 0, 1, 0, 1]})
    frame.write_csv(tmp_path / "rows.csv")
    explain("rows.csv", "--target", "t", "--activation", "relu", "--html", "page.html", cwd=tmp_path)
    visit = Visit(chromium, tmp_path / "page.html")
    shown = [[float(visit.input(f"features.{i}.{j}").input_value()) for j in range(2)] for i in range(4)]
    assert shown == [[1.5, 9], [2, 8], [4, 5], [3.5, 6]]
    assert visit.page.inner_text(".rows thead").split("\t")[1:4] == [NASTY, "iq", "t"]
    assert visit.text("g.formula") == "relu(v) = max(0, v)"
    assert visit.complaints == []
    visit.context.close()


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("rows.csv", "error: --html must name an .html file; got 'rows.csv'"),
        ("", "error: --html must name an .html file; got '.'"),
        ("folder.html", "error: --html must name a file; 'folder.html' is a folder"),
        ("pipe.html", "error: --html must name a file; 'pipe.html' is a device or a pipe"),
        (
            "absent/page.html",
            "error: --html must name a file in a folder that exists; there is no folder 'absent'",
        ),
        ("rows.csv/page.html", "error: --html must name a file in a folder that exists; there is no folder 'rows.csv'"),
        (
            f"{'n' * 300}.html",
            f"error: --html must name a file that can be written; '{'n' * 300}.html': File name too long",
        ),
    ],
)
def test_a_file_that_can_not_be_written_is_one_sentence_and_status_2(tmp_path, name, sentence):
    (tmp_path / "rows.csv").write_text("a,b,y\n")
    (tmp_path / "folder.html").mkdir()
    os.mkfifo(tmp_path / "pipe.html")
    assert explain("--html", name, cwd=tmp_path, status=2) == sentence
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder.html", "pipe.html", "rows.csv"]
    assert (tmp_path / "rows.csv").read_text() == "a,b,y\n"


def test_data_that_can_not_be_used_leave_the_page_that_was_there(tmp_path):
    (tmp_path / "page.html").write_text("old")
    (tmp_path / "rows.csv").write_text("a,b,y\n1e300,1,0\n-1e300,2,1\n3e300,5,0\n")
    sentence = explain("rows.csv", "--html", "page.html", cwd=tmp_path, status=2)
    assert sentence.startswith("error: a, b must be numbers whose squares are finite; got [1e+300,")
    assert (tmp_path / "page.html").read_text() == "old"


@contextlib.contextmanager
def full_disk():
    """No file may grow beyond 1,000 bytes."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)


def test_on_a_full_disk_the_old_page_stays_and_nothing_is_left_behind(tmp_path):
    (tmp_path / "page.html").write_text("old")
    with full_disk():
        sentence = explain("--html", "page.html", cwd=tmp_path, status=2)
    assert sentence == "error: 'page.html' must be writable, with disk to spare: File too large"
    assert (tmp_path / "page.html").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["page.html"]


def test_in_a_read_only_folder_the_old_page_stays():
    with tempfile.TemporaryDirectory() as name:
        folder, user = Path(name), os.geteuid()
        (folder / "page.html").write_text("old")
        folder.chmod(0o555)
        try:
            if user == 0:  # to whom no folder is read-only
                os.seteuid(65534)
            sentence = explain("--html", folder / "page.html", cwd="/", status=2)
        finally:
            os.seteuid(user)
            folder.chmod(0o755)
        assert sentence == f"error: '{folder}/page.html' must be writable, with disk to spare: Permission denied"
        assert (folder / "page.html").read_text() == "old"
        assert [path.name for path in folder.iterdir()] == ["page.html"]


INTERRUPTED = """
import os, signal, sys
sys.addaudithook(lambda event, _: os.kill(os.getpid(), signal.SIGINT) if event == "os.rename" else None)
from batchnorm.cli import main
main()
"""


def test_ctrl_c_while_the_page_is_written_leaves_the_old_one_and_no_litter(tmp_path):
    (tmp_path / "page.html").write_text("old")
    command = [sys.executable, "-W", "error", "-c", INTERRUPTED, "explain", "--html", "page.html"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")
    assert (tmp_path / "page.html").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["page.html"]


def test_a_link_is_followed_and_stays_a_link(tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "page.html").symlink_to("there/page.html")
    explain("--html", "page.html", cwd=tmp_path)
    assert (tmp_path / "page.html").is_symlink()
    assert (tmp_path / "there/page.html").stat().st_size > 10_000
