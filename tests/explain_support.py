"""Helpers for the tests of the page of ``batchnorm explain --html``."""

import pytest
import torch

import batchnorm as bn
from batchnorm.lab.teaching.worked_example import NOTES
from support import PageVisit

NASTY = "</script><img src=x onerror=alert(1)>"
LONG = "the_intelligence_quotient_measured_in_the_first_year"
MINUS = "\u2212"
FUNCTIONS = {"identity": lambda v: v, "sigmoid": torch.sigmoid, "tanh": torch.tanh, "relu": torch.relu}


class ExplainVisit(PageVisit):
    """The page of a worked example, open in a browser."""

    def __init__(self, browser, path, *, width=1440, **options):
        super().__init__(browser, path, width=width, **options)

    def wait(self, expression):
        """Wait until an expression holds; the page's policy forbids Playwright's own way of waiting."""
        for _ in range(400):
            if self.page.evaluate(expression):
                return
            self.page.wait_for_timeout(25)
        pytest.fail(f"waited in vain for {expression}")

    def text(self, key):
        """Return the text that the page shows under a key, with ASCII minus signs and blanks."""
        return self.page.text_content(f"[data-out='{key}']").replace(MINUS, "-").replace("\u00a0", " ")

    def number(self, key):
        """Return the number that the page shows under a key."""
        return float(self.text(key))

    def numbers(self, key, count=4):
        """Return the numbers that the page shows under a key, one per row."""
        return [self.number(f"{key}.{i}") for i in range(count)]

    def input(self, path):
        """Return the input of a number."""
        return self.page.locator(f"[id='{path}']")

    def type(self, path, text):
        """Type a text into the input of a number."""
        self.input(path).focus()
        self.page.keyboard.press("Control+a")
        self.page.keyboard.press("Backspace")
        self.page.keyboard.type(text)

    def problem(self, path):
        """Return the message beside an input, or None."""
        problem = self.page.locator(f"[id='{path}-problem']")
        return problem.text_content() if problem.is_visible() else None

    def choose(self, key, value):
        """Press the button of a choice."""
        self.page.locator(f"[data-choice={key}][data-value='{value}']:visible").first.click()

    def points(self):
        """Return the centers (x, y) of the four moving points of the strip."""
        return self.page.eval_on_selector_all(
            "#strip .point", "points => points.map((p) => [Number(p.getAttribute('cx')), Number(p.getAttribute('cy'))])"
        )


def neuron(case, row):
    """Return z of a row, by the page's operations in their order, so that both agree to the last bit."""
    return case["weights"][0] * row[0] + case["weights"][1] * row[1] + case["bias"]


def layer_of(case, placement):
    """Return the layer of a case, whose activation belongs to it with the placement before."""
    activation = case["activation"] if placement == "before" and case["activation"] != "identity" else None
    layer = bn.BatchNorm1d(1, case["eps"], case["momentum"], dtype=torch.float64, activation=activation)
    with torch.no_grad():
        layer.weight.fill_(case["gamma"])
        layer.bias.fill_(case["beta"])
    return layer


def expected(placement="before", activation="sigmoid", features=NOTES.features, **changed):
    """Return the library's explanation of the rows of the notes, with some numbers changed."""
    values = {"w1": 1.0, "w2": 0.1, "b": -16.0, "gamma": 1.0, "beta": 0.0, "eps": 1e-5} | changed
    case = values | {"weights": [values["w1"], values["w2"]], "bias": values["b"], "momentum": 0.1}
    case["activation"] = activation
    x = torch.tensor([[neuron(case, row)] for row in features], dtype=torch.float64)
    x = FUNCTIONS[activation](x) if placement == "after" else x
    return bn.explain(layer_of(case, placement), x)


def assert_shows(visit, **changed):
    """Check that every number of both placements is the library's."""
    for placement in ("before", "after"):
        training = expected(placement, **changed).training
        assert visit.number(f"{placement}.mean") == pytest.approx(training.mean.item(), abs=1e-4, rel=5e-5)
        assert visit.number(f"{placement}.sd") == pytest.approx(training.sd.item(), abs=1e-4)
        assert visit.numbers(f"{placement}.zHat") == pytest.approx(training.z_hat.flatten().tolist(), abs=1e-4)
        assert visit.numbers(f"{placement}.y") == pytest.approx(training.y.flatten().tolist(), abs=1e-4)
        assert visit.numbers(f"now.{placement}.zHat") == visit.numbers(f"{placement}.zHat")
    output = expected("before", **changed).training.output.flatten().tolist()
    assert visit.numbers("before.output") == pytest.approx(output, abs=1e-4)
