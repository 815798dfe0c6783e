"""Accessibility, widths and print of the explain page."""

import re

import pytest

from batchnorm.lab.teaching.worked_example import MiniBatch
from explain_support import LONG, MINUS

pytestmark = pytest.mark.browser


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
        "normalized 1.1949, -1.0474, 0.7819, -0.9294."
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
    colors = visit.page.evaluate(
        "[getComputedStyle(document.body).color, getComputedStyle(document.body).backgroundColor]"
    )
    ink, paper = ([int(part) for part in re.findall(r"\d+", color)] for color in colors)
    assert max(ink) < 60
    assert min(paper) == 255


def test_a_small_table_of_three_rows_has_three_of_everything(open_page):
    visit = open_page(MiniBatch(("a", "b"), [(1.0, 9.0), (2.0, 4.0), (4.0, 5.0)]))
    assert len(visit.points()) == 3
    assert visit.page.locator("[data-choice=swapped]").count() == 3
    assert "for m = 3 rows" in visit.text("before.bound")
