"""The texts, numbers and points that the explain page shows."""

from itertools import pairwise

import numpy as np
import pytest

from batchnorm.lab.teaching.worked_example import NOTES, MiniBatch, worked_example
from explain_support import LONG, NASTY, expected

pytestmark = pytest.mark.browser


def test_the_numbers_shown_at_the_start_are_those_that_the_command_prints(visit):
    example = worked_example()
    printed = str(example)
    for placement, layer in (("before", example.before), ("after", example.after)):
        for key in ("mean", "var", "sd"):
            assert visit.number(f"{placement}.{key}") == pytest.approx(getattr(layer, key), abs=5e-5)
            assert visit.text(f"{placement}.{key}") in printed
        for key, values in (("zHat", layer.z_hat), ("y", layer.y)):
            assert visit.numbers(f"{placement}.{key}") == pytest.approx(values, abs=5e-5)
            assert all(visit.text(f"{placement}.{key}.{i}") in printed for i in range(4))
    assert visit.numbers("before.output") == pytest.approx(example.before.output, abs=5e-6)
    assert visit.numbers("after.input") == pytest.approx(example.after.input, abs=5e-6)


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


def test_the_points_move_from_raw_to_normalized_to_scaled_and_shifted(visit):
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
    assert visit.text("stage") == "50% from raw to normalized"
    assert visit.page.get_attribute("#stage-slider", "aria-valuetext") == "50% from raw to normalized"
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
    assert set(visit.page.evaluate("[...window.seen]")) == {"normalized", "scaled and shifted"}


def test_points_in_one_place_do_not_hide_each_other(open_page):
    visit = open_page(MiniBatch(("a", "b"), [(5.0, 1.0)] * 4))
    points = visit.points()
    assert len({x for x, _ in points}) == 1
    heights = sorted(y for _, y in points)
    assert min(b - a for a, b in pairwise(heights)) > 12
    assert visit.numbers("before.zHat") == [0, 0, 0, 0]
