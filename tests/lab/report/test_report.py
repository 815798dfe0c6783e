import dataclasses
import html
import json
import math
import statistics

import pytest

from batchnorm.lab.comparison.conduct import compare
from batchnorm.lab.comparison.request import Request
from batchnorm.lab.comparison.run_file import RunFile, read_run
from batchnorm.lab.data.columns import LeftOut
from batchnorm.lab.data.dataset import prepare
from batchnorm.lab.data.tables import read_table
from batchnorm.lab.report.report import report_data, write_report
from batchnorm.lab.report.terminal import Silence
from batchnorm.lab.training.settings import ARMS, Settings
from support import run_json

NASTY = "</script><img src=x onerror=alert(1)>"
SETTINGS = Settings(
    hidden=(12,), batch_size=60, learning_rates=(0.1, 1.0, 3.0), search_seeds=2, seeds=3, steps=120, activation="tanh"
)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A real comparison, small, of data that is named as nastily as can be."""
    digits = prepare(read_table("digits", None))
    dataset = dataclasses.replace(
        digits,
        name=NASTY,
        target=NASTY,
        classes=[NASTY, *digits.classes[1:]],
        features=[NASTY, *digits.features[1:]],
        left_out=[LeftOut(NASTY, "it has one value")],
        notes=[f"classification: {NASTY} has 10 values"],
    )
    folder, request = tmp_path_factory.mktemp("run"), Request(data="digits")
    run = RunFile.create(folder, dataset.describe(), SETTINGS, request=request, command=f"echo {NASTY}")
    compare(dataset, run, jobs=1, progress=Silence())
    return run


@pytest.fixture(scope="module")
def page_path(run):
    return write_report(run)


def drawing(report, key):
    return next(figure for figure in report.drawings if figure["key"] == key)


def figure_of(report, key):
    return next(figure for section in report.sections for figure in section.figures if figure.key == key)


def series_of(plot, arm, **wanted):
    return next(s for s in plot["series"] if s["group"] == arm and all(s[name] == wanted[name] for name in wanted))


def raw_runs(run, phase, arm):
    """The runs as run.json has them, without the library's reader."""
    stacks = [s for s in run_json(run)["stacks"] if s["phase"] == phase and s["arm"] == arm]
    return [values for stack in stacks for values in stack["runs"]]


def copied(run, folder, change=lambda content: None, **changes):
    """The run as it is read back from disk, changed, in a folder of its own."""
    content = run_json(run) | changes
    change(content)
    (folder / "run.json").write_text(json.dumps(content))
    return read_run(folder)


def test_the_page_says_the_verdict_the_caveat_and_a_row_for_every_arm(run, page_path):
    text = page_path.read_text()
    assert html.escape(run.result.verdict) in text
    assert html.escape(run.result.caveat) in text
    for row in report_data(run).rows:
        for words in (row.label, row.learning_rate, row.steps, row.ratio, row.seconds_ratio, row.test_difference):
            assert html.escape(words) in text


def test_the_page_is_under_6_megabytes(page_path):
    assert page_path.stat().st_size < 6_000_000


def test_a_run_read_back_from_disk_gives_the_same_page_as_the_one_in_memory(run, page_path):
    text = page_path.read_text()
    assert write_report(read_run(run.folder)).read_text() == text


def test_steps_in_the_table_are_the_median_of_arrivals_counted_by_hand(run):
    report = report_data(run)
    target, evaluations = run.result.target.value, run.result.evaluation_steps
    for arm, row in zip(ARMS, report.rows, strict=True):
        arrivals = []
        for values in raw_runs(run, "confirm", arm):
            good = [score is not None and score >= target for score in values["validation_score"]]
            three = [i for i in range(len(good) - 2) if good[i] and good[i + 1] and good[i + 2]]
            arrivals.append(evaluations[three[0]] if three else math.inf)
        median = statistics.median(arrivals)
        assert row.steps == (f"> {SETTINGS.steps}" if median == math.inf else f"{median:.0f}")


@pytest.mark.parametrize(
    ("figure", "plot", "curve"),
    [("race", 0, "validation_loss"), ("curves", 0, "train_loss"), ("curves", 1, "validation_score")],
)
def test_a_drawn_curve_is_the_median_over_seeds_with_order_statistics_about_it(run, figure, plot, curve):
    drawn = drawing(report_data(run), figure)["plots"][plot]
    for arm in ARMS:
        values = [sorted(at) for at in zip(*(r[curve] for r in raw_runs(run, "confirm", arm)), strict=True)]
        series = series_of(drawn, arm)
        assert series["x"] == run.result.evaluation_steps
        assert series["y"] == pytest.approx([statistics.median(at) for at in values], rel=1e-4)
        assert series["low"] == pytest.approx([at[0] for at in values], rel=1e-4)
        assert series["high"] == pytest.approx([at[-1] for at in values], rel=1e-4)


def test_at_the_target_the_moving_target_gives_the_ratio_of_the_table(run):
    report, target = report_data(run), run.result.target.value
    rows = {row[0]: row[1:] for row in figure_of(report, "target").table.rows}
    assert list(rows[f"{target:.4g}"]) == [row.ratio for row in report.rows[1:]]


def test_steps_to_every_score_rise_with_the_score_and_hold_the_target(run):
    report = report_data(run)
    rows = {row[0]: row[1:] for row in figure_of(report, "scores").table.rows}
    assert list(rows[f"{run.result.target.value:.4f}"]) == [row.steps for row in report.rows]
    for arm in ARMS:
        known = [y for y in series_of(drawing(report, "scores")["plots"][0], arm)["y"] if y is not None]
        assert known == sorted(known)


def test_variants_that_did_not_arrive_lie_beyond_the_steps_trained(run):
    series = drawing(report_data(run), "variants")["plots"][0]["series"]
    for arm in ARMS:
        for row, x, mark in zip(
            run.result.sensitivity,
            *(series_of({"series": series}, arm)[n] for n in ("x", "marks")),
            strict=True,
        ):
            if row.steps[arm] is None:
                assert mark == "beyond"
                assert x > SETTINGS.variant_steps
            else:
                assert (x, mark) == (row.steps[arm], "known")


def test_every_figure_has_a_finding_and_a_table_without_a_gap(run):
    report = report_data(run)
    assert [figure["key"] for figure in report.drawings] == [
        "race", "variants", "rates", "target", "curves", "scores", "inputs",
    ]  # fmt: skip
    for section in report.sections:
        for figure in section.figures:
            assert figure.finding.endswith(".")
            assert figure.table.rows
            assert {len(row) for row in figure.table.rows} == {len(figure.table.columns)}


def test_the_page_opens_without_a_complaint_and_asks_no_host_for_anything(visit, page_path):
    assert visit.complaints == []
    assert [url for url in visit.requests if not url.startswith("data:")] == [page_path.as_uri()]


def test_names_from_the_users_file_are_shown_as_text_and_never_run(visit, page_path):
    assert NASTY not in page_path.read_text()
    assert visit.page.locator("img").count() == 0
    said = visit.page.inner_text("body")
    assert said.count(NASTY) >= 6  # the verdict, the command, target, feature, class, column left out


def test_every_plot_has_a_text_alternative(visit):
    labels = visit.page.eval_on_selector_all(".plot", "places => places.map((place) => place.ariaLabel)")
    assert len(labels) == 12
    assert all(len(label) > 40 for label in labels)
    assert visit.page.locator("figure > figcaption").count() == visit.page.locator("figure details table").count() == 7


def test_buttons_turn_an_axis_from_logarithmic_to_linear_and_back(visit):
    for value in ("linear", "log"):
        visit.press("race", "x", value)
        visit.press("race", "y", value)
        assert {visit.axis("race", name, plot)["type"] for name in "xy" for plot in (0, 1)} == {value}


def test_a_button_counts_seconds_in_place_of_steps(visit, run):
    visit.press("curves", "time", "seconds")
    assert visit.axis("curves", "x")["title"] == "seconds of one thread"
    seconds = [run.result.arms[arm].seconds_per_step * SETTINGS.steps for arm in ARMS]
    assert [x for _, x in visit.lines("curves")] == pytest.approx(seconds, rel=1e-4)
    visit.press("curves", "time", "steps")
    assert [x for _, x in visit.lines("curves")] == [SETTINGS.steps] * 3


def test_a_button_shows_another_unit_of_the_last_layer(visit):
    before = visit.page.evaluate("document.querySelector('#figure-inputs .plot').data[1].y")
    visit.press("inputs", "unit", "2")
    assert visit.page.evaluate("document.querySelector('#figure-inputs .plot').data[1].y") != before
    assert len({tuple(visit.axis("inputs", "y", plot)["range"]) for plot in range(3)}) == 1


def test_an_arm_can_be_taken_out_of_every_figure_and_put_back(visit):
    key = visit.page.locator("#figure-race .key[data-group=none]")
    key.click()
    assert len(visit.lines("race")) == len(visit.lines("curves")) == 2
    assert set(visit.page.eval_on_selector_all(".key[data-group=none]", "k => k.map((b) => b.ariaPressed)")) == {
        "false"
    }
    key.click()
    assert len(visit.lines("race")) == 3


def test_the_race_is_run_from_the_first_step_to_the_last(visit):
    ranges = [visit.axis("race", name, plot)["range"] for name in "xy" for plot in (0, 1)]
    visit.page.click(".replay")
    visit.page.wait_for_selector(".replay:disabled")
    early = [x for _, x in visit.lines("race")]
    assert [visit.axis("race", name, plot)["range"] for name in "xy" for plot in (0, 1)] == ranges
    assert max(x for x in early if x is not None) < SETTINGS.steps
    visit.page.wait_for_selector(".replay:enabled")
    assert [x for _, x in visit.lines("race")] == [SETTINGS.steps] * 3
    assert [visit.axis("race", name, plot)["range"] for name in "xy" for plot in (0, 1)] == ranges
    assert visit.complaints == []


def test_a_phone_of_360_pixels_shows_the_page_without_scrolling_sideways(open_report, page_path):
    visit = open_report(page_path, width=360)
    visit.page.evaluate("document.querySelectorAll('details').forEach((details) => { details.open = true; })")
    assert visit.page.evaluate("document.documentElement.scrollWidth") == 360
    wide = "[...document.querySelectorAll('.plot .main-svg')].filter((svg) => svg.getBoundingClientRect().right > 360)"
    assert visit.page.evaluate(wide + ".length") == 0
    assert visit.complaints == []


def test_figures_take_on_the_colors_of_a_dark_screen(visit):
    light = visit.lines("race")
    visit.page.emulate_media(color_scheme="dark")
    for _ in range(100):
        dark = visit.lines("race")
        if dark != light:
            break
        visit.page.wait_for_timeout(50)
    assert not {color for color, _ in dark} & {color for color, _ in light}
    assert visit.complaints == []
    visit.page.emulate_media(color_scheme="light")


def stacks_of(run, *phases):
    return [stack for stack in run_json(run)["stacks"] if stack["phase"] in phases]


def searched(run):
    """The result as it is when the search is finished and nothing else."""
    result = run_json(run)["result"]
    result |= {"ratios": {}, "sensitivity": [], "stacking": None}
    del result["verdict"], result["caveat"]
    for values in result["arms"].values():
        values |= {"steps": [], "median_steps": None, "seconds_per_step": None, "test_scores": [], "test_score": None}
    return result


PARTS = {
    "nothing finished": lambda run: {"stacks": [], "result": None},
    "one arm searched": lambda run: {"stacks": stacks_of(run, "search")[:1], "result": None},
    "searched": lambda run: {"stacks": stacks_of(run, "search"), "result": searched(run)},
    "one arm confirmed": lambda run: {
        "stacks": stacks_of(run, "search") + stacks_of(run, "confirm")[:1], "result": searched(run),
    },
    "all but variants": lambda run: {"stacks": stacks_of(run, "search", "confirm"), "result": searched(run)},
}  # fmt: skip


@pytest.mark.parametrize("part", PARTS)
def test_an_interrupted_run_is_drawn_as_far_as_it_got_and_says_how_to_go_on(run, tmp_path, part):
    partial = copied(run, tmp_path, status="interrupted", **PARTS[part](run))
    text = write_report(partial).read_text()
    assert "no verdict yet" in text
    assert f"batchnorm compare --resume {tmp_path}" in text
    assert {arm for figure in report_data(partial).drawings for plot in figure["plots"] for s in plot["series"]
            for arm in [s["group"]]} == {stack.arm for stack in partial.stacks}  # fmt: skip


def test_an_interrupted_run_of_data_from_python_offers_no_command_to_resume_it(run, tmp_path):
    partial = copied(run, tmp_path, status="interrupted", **PARTS["searched"](run))
    partial.request = Request()
    text = write_report(partial).read_text()
    assert "are kept and drawn here" in text
    assert "--resume" not in text.partition("<script")[0]


def test_the_page_of_an_interrupted_run_opens_without_a_complaint(run, open_report, tmp_path):
    partial = copied(run, tmp_path, status="interrupted", **PARTS["one arm confirmed"](run))
    visit = open_report(write_report(partial))
    assert visit.complaints == []


def test_a_baseline_that_always_diverged_is_drawn_beside_those_that_did_not(run, open_report, tmp_path):
    def diverge(content):
        for stack in content["stacks"]:
            for values in stack["runs"] if stack["arm"] == "none" else []:
                gone = [None] * len(values["train_loss"])
                values |= {"diverged_at": 1, "train_loss": gone, "validation_loss": gone, "validation_score": gone}
                values["trace"] = values["trace"] and [[[None] * 3 for _ in unit] for unit in values["trace"]]
        content["result"]["target"] |= {"measure": "loss", "value": "-inf"}
        content["result"]["headline"] = False

    changed = copied(run, tmp_path, diverge)
    report = report_data(changed)
    assert "not finite without batch norm" in figure_of(report, "race").finding
    assert set(series_of(drawing(report, "race")["plots"][0], "none")["y"]) == {None}
    visit = open_report(write_report(changed))
    assert visit.complaints == []


def test_few_validation_rows_claim_no_ratio(run, tmp_path):
    changed = copied(run, tmp_path, lambda content: content["result"].update(headline=False))
    report = report_data(changed)
    assert [row.ratio for row in report.rows] == ["1", "not claimed", "not claimed"]
    assert "target" not in [figure["key"] for figure in report.drawings]


def test_medians_count_a_diverged_run_as_the_worst(run, tmp_path):
    changed = copied(run, tmp_path)
    lost, *others = changed.runs("confirm", "before")
    lost.validation_score = lost.validation_score[:5] + [math.nan] * (len(lost.validation_score) - 5)
    rest = [other.validation_score[-1] for other in others]
    curve = series_of(drawing(report_data(changed), "curves")["plots"][1], "before")
    assert curve["y"][-1] == pytest.approx(min(rest), rel=1e-4)
    assert curve["low"][-1] is None
