"""Fixtures for the tests of the worked example's page."""

import pytest

from batchnorm.lab.teaching.explain_page import write_page
from batchnorm.lab.teaching.worked_example import NOTES, worked_example
from explain_support import ExplainVisit


@pytest.fixture(scope="module")
def notes_page(tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "notes.html"
    write_page(worked_example(), path)
    return path


@pytest.fixture(scope="module")
def window(chromium, notes_page):
    window = ExplainVisit(chromium, notes_page)
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
        opened.append(ExplainVisit(chromium, path, **options))
        return opened[-1]

    yield open_it
    for visit in opened:
        visit.context.close()
