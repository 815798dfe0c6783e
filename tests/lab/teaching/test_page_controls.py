"""Sliders, cells and buttons of the explain page, by mouse and by keyboard."""

import pytest

from batchnorm.lab.teaching.explain_page import page_data
from batchnorm.lab.teaching.worked_example import worked_example
from explain_support import FUNCTIONS, assert_shows

pytestmark = pytest.mark.browser


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
    assert_shows(visit, **{key: float(visit.input(key).input_value())})
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
    assert_shows(visit, gamma=gamma)


@pytest.mark.parametrize(("key", "text"), [("w1", "0.123"), ("b", "250"), ("gamma", "-7.5"), ("eps", "0.5")])
def test_a_number_typed_beside_a_slider_counts_as_it_is_and_may_lie_beyond_it(visit, key, text):
    visit.type(key, text)
    assert_shows(visit, **{key: float(text)})
    assert visit.input(key).input_value() == text


@pytest.mark.parametrize("activation", FUNCTIONS)
def test_another_nonlinearity_changes_both_placements_and_its_formula(visit, activation):
    visit.page.select_option("#activation", activation)
    assert_shows(visit, activation=activation)
    assert visit.text("g.formula").startswith(f"{activation}(v) =")
    assert visit.text("before.output.sum.0").startswith(f"{activation}(")


def test_the_page_starts_with_the_nonlinearity_asked_for(open_page):
    visit = open_page(activation="tanh")
    assert visit.page.input_value("#activation") == "tanh"
    assert_shows(visit, activation="tanh")


def test_a_row_that_is_edited_changes_every_number(visit):
    visit.type("features.1.0", "9.75")
    visit.type("features.3.1", "120")
    rows = [(8.9, 100), (9.75, 89), (9.1, 91), (7.7, 120)]
    assert visit.numbers("z") == pytest.approx([row[0] + 0.1 * row[1] - 16 for row in rows], abs=1e-4)
    assert_shows(visit, features=rows)


@pytest.mark.parametrize(
    ("path", "text", "message"),
    [
        ("features.0.1", "", "Must be a number; it is empty. The figures keep 100."),
        ("features.2.0", "-", "Must be a number; this is not one. The figures keep 9.1."),
        ("gamma", "e", "Must be a number; this is not one. The figures keep 1."),
        ("eps", "0", "Must be above 0; got 0. The figures keep 0.00001."),
        (
            "features.1.1",
            "1e200",
            "Must be closer to 0; with 1e+200 the figures are too large to calculate. They keep 89.",
        ),
        ("batches", "1.5", "Must be a whole number from 0 to 10000; got 1.5. The figures keep 1."),
        ("neurons", "0", "Must be a whole number from 1 to 1000000000; got 0. The figures keep 100."),
        ("single.0", "", "Must be a number; it is empty. The figures keep 9.1."),
        ("other.1", "", "Must be a number; it is empty. The figures keep 80."),
    ],
)
def test_an_invalid_edit_is_named_beside_it_and_the_last_figures_stay(visit, path, text, message):
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
