"""Fixtures for the tests of the lab: data sets, a browser and axe-core."""

import functools
import os
import shutil
from pathlib import Path

import pytest
from playwright.sync_api import sync_playwright

from batchnorm.lab.data.dataset import prepare
from batchnorm.lab.data.tables import read_table
from support import PageVisit, skip_or_fail

AXE = Path(__file__).parents[2] / ".venv/axe/package/axe.min.js"


@pytest.fixture(scope="session")
def digits():
    """The data set of handwritten digits, prepared."""
    return prepare(read_table("digits"))


@pytest.fixture(scope="session")
def wine():
    """The data set of wines, prepared."""
    return prepare(read_table("wine"))


@pytest.fixture(scope="module")
def chromium():
    """A browser."""
    executable = shutil.which("chromium") or shutil.which("chromium-browser")
    if executable is None:
        skip_or_fail("this test needs a browser: apt-get install chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def axe_source():
    """The source of axe-core, which finds accessibility faults."""
    path = Path(os.environ.get("AXE_CORE", AXE))
    if not path.is_file():
        skip_or_fail(f"this test needs axe-core; there is no file {path}: make test fetches it, or AXE_CORE names one")
    return path.read_text(encoding="utf-8")


class ReportVisit(PageVisit):
    """A report open in a browser."""

    def open(self, path):
        """Load the report, and wait until its figures are drawn."""
        super().open(path)
        self.page.wait_for_selector("html[data-figures=drawn]")

    def axis(self, figure, name, plot=0):
        """Return the drawn axis of a plot of a figure."""
        return self.page.evaluate(
            "([figure, name, plot]) => { const axis = document.querySelectorAll(`#figure-${figure} .plot`)[plot]"
            "._fullLayout[name + 'axis']; return { type: axis.type, range: axis.range, title: axis.title.text }; }",
            [figure, name, plot],
        )

    def drawn(self, figure, plot=0):
        """Return the traces that Plotly draws in a plot of a figure."""
        return self.page.evaluate(
            "([figure, plot]) => document.querySelectorAll(`#figure-${figure} .plot`)[plot].data", [figure, plot]
        )

    def lines(self, figure, plot=0):
        """Return the color and the last x of each line in a plot of a figure."""
        return [
            [trace["line"]["color"], trace["x"][-1]]
            for trace in self.drawn(figure, plot)
            if "fill" not in trace and trace["mode"] == "lines"
        ]

    def press(self, figure, control, value):
        """Click a control of a figure."""
        self.page.click(f"#figure-{figure} [data-control={control}][data-value='{value}']")


@pytest.fixture(scope="module")
def new_visit(chromium):
    """``new_visit(path)``: open a report; the caller closes it."""
    return functools.partial(ReportVisit, chromium)


@pytest.fixture
def open_report(new_visit):
    """``open_report(path, **options)``: open a report in a browser context of its own until the end of the test."""
    opened = []

    def open_it(path, **options):
        opened.append(new_visit(path, **options))
        return opened[-1]

    yield open_it
    for visit in opened:
        visit.context.close()
