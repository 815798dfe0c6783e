"""A browser, and axe-core: what the tests of the pages look through."""

import functools
import os
import shutil
from pathlib import Path

import pytest
from playwright.sync_api import sync_playwright

AXE = Path(__file__).parents[2] / ".venv/axe/package/axe.min.js"


def missing(sentence):
    """Skip the test with a word; in CI fail it."""
    (pytest.fail if os.environ.get("CI") else pytest.skip)(sentence)


@pytest.fixture(scope="module")
def chromium():
    executable = shutil.which("chromium") or shutil.which("chromium-browser")
    if executable is None:
        missing("this test looks at a page in a browser: apt-get install chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def axe_source():
    """The source of axe-core, which finds faults of accessibility."""
    path = Path(os.environ.get("AXE_CORE", AXE))
    if not path.is_file():
        missing(f"this test needs axe-core; there is no file {path}: make test fetches it, or AXE_CORE names one")
    return path.read_text(encoding="utf-8")


class ReportVisit:
    """A report that is open in a browser, and what went wrong or out of it."""

    def __init__(self, browser, path, *, width=1280, **options):
        self.context = browser.new_context(viewport={"width": width, "height": 900}, **options)
        self.page = self.context.new_page()
        self.complaints, self.requests = [], []
        self.page.on("console", lambda message: self.complaints.append(message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("dialog", lambda dialog: (self.complaints.append(dialog.message), dialog.dismiss()))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(path.as_uri())
        self.page.wait_for_selector("html[data-figures=drawn]")

    def axis(self, figure, name, plot=0):
        """The drawn axis of a plot of a figure."""
        return self.page.evaluate(
            "([figure, name, plot]) => { const axis = document.querySelectorAll(`#figure-${figure} .plot`)[plot]"
            "._fullLayout[name + 'axis']; return { type: axis.type, range: axis.range, title: axis.title.text }; }",
            [figure, name, plot],
        )

    def drawn(self, figure, plot=0):
        """What Plotly was given to draw in a plot of a figure."""
        return self.page.evaluate(
            "([figure, plot]) => document.querySelectorAll(`#figure-${figure} .plot`)[plot].data", [figure, plot]
        )

    def lines(self, figure, plot=0):
        """Colour, and last x, of the drawn lines of a plot of a figure."""
        return [
            [trace["line"]["color"], trace["x"][-1]]
            for trace in self.drawn(figure, plot)
            if "fill" not in trace and trace["mode"] == "lines"
        ]

    def press(self, figure, control, value):
        self.page.click(f"#figure-{figure} [data-control={control}][data-value='{value}']")


@pytest.fixture(scope="module")
def new_visit(chromium):
    """Opens a report, to be closed by who asked."""
    return functools.partial(ReportVisit, chromium)


@pytest.fixture
def open_report(new_visit):
    """Opens a report in a browser of its own kind, for one test."""
    opened = []

    def open_it(path, **options):
        opened.append(new_visit(path, **options))
        return opened[-1]

    yield open_it
    for visit in opened:
        visit.context.close()
