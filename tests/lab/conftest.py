"""A browser, and axe-core: what the tests of the pages look through."""

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
