"""The page of a test file's own run, open in a browser."""

import pytest


@pytest.fixture(scope="module")
def visit(new_visit, page_path):
    visit = new_visit(page_path)
    yield visit
    visit.context.close()
