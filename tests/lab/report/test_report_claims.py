"""What the report shows of a study: verdicts, a section a claim, its figures, its data; and how it is used."""

import csv
import dataclasses
import io
import json
import re

import numpy as np
import pytest
from markupsafe import escape

from batchnorm.lab.claims import CLAIMS, ClaimTests, read_judgment
from batchnorm.lab.comparison.conduct import compare
from batchnorm.lab.comparison.run_file import RunFile, read_run
from batchnorm.lab.data.dataset import prepare
from batchnorm.lab.data.tables import read_table
from batchnorm.lab.report.report import report_data, write_report
from batchnorm.lab.report.terminal import Silence
from batchnorm.lab.training.settings import ARMS, Settings
from support import run_json

NASTY = "</script><img src=x onerror=alert(1)>"
SETTINGS = Settings(
    hidden=(10, 8), batch_size=60, learning_rates=(0.1, 1.0, 3.0), search_seeds=1, seeds=5, steps=80, activation="tanh"
)
FIGURES = {
    "fewer_steps": ["race"],
    "stability": ["stability"],
    "initial_weights": ["initial_weights"],
    "regularization": ["regularization"],
    "inputs": ["contours"],
    "placement": ["placements"],
    "shift": ["drift", "layers", "subnetworks"],
}
SLIDERS = ["contours-step", "layers-step", "subnetworks-step"]


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """A real study, small, of data that is named as nastily as can be."""
    digits = prepare(read_table("digits", None))
    dataset = dataclasses.replace(digits, name=NASTY, target=NASTY, features=[f"{NASTY}{i}" for i in range(64)])
    run = RunFile.create(tmp_path_factory.mktemp("study"), dataset.describe(), SETTINGS, command="x")
    compare(dataset, run, jobs=1, progress=Silence(), extension=ClaimTests(list(CLAIMS)))
    return run


@pytest.fixture(scope="module")
def report(study):
    return report_data(study)


@pytest.fixture(scope="module")
def page_path(study):
    return write_report(study)


def changed(study, folder, change):
    """The study as it is read back from disk, with its claims changed, in a folder of its own."""
    content = run_json(study)
    change({claim["name"]: claim for claim in content["result"]["claims"]})
    (folder / "run.json").write_text(json.dumps(content))
    return read_run(folder)


def section(report, name):
    return next(section for section in report.claims if section.key == f"claim-{name}")


def figure_of(report, key):
    return next(figure for figure in report.figures if figure.key == key)


def details_of(study, name):
    return next(claim["details"] for claim in run_json(study)["result"]["claims"] if claim["name"] == name)


def rows_of(download):
    return list(csv.DictReader(io.StringIO(download.data.csv())))


# What the report says.


def test_without_a_study_the_report_is_as_it_was(study, tmp_path):
    content = run_json(study)
    del content["result"]["claims"], content["result"]["power"]
    (tmp_path / "run.json").write_text(json.dumps(content))
    run = read_run(tmp_path)
    assert report_data(run).sections[0].key == "race"
    text = write_report(run).read_text().partition("<script")[0]
    assert not re.search(r'class="verdict|id="claims"|id="claim-|Verdicts\.|download=', text)


def test_a_claim_has_a_section_with_its_question_its_verdict_and_its_design(study, page_path):
    text = page_path.read_text()
    headings = re.findall(r'<h2 id="claim-(\w+)">', text)
    assert headings == [claim["name"] for claim in run_json(study)["result"]["claims"]]
    for claim in run_json(study)["result"]["claims"]:
        for words in (claim["title"], claim["question"], claim["sentence"], claim["design"]):
            assert escape(words) in text


def test_the_opening_table_gives_every_finding_a_word_and_a_mark(visit, study):
    findings = [finding for claim in run_json(study)["result"]["claims"] for finding in claim["findings"]]
    said = visit.page.eval_on_selector_all(".verdicts .verdict", "all => all.map((one) => one.textContent.trim())")
    assert sorted(said) == sorted(finding["verdict"] for finding in findings)
    assert visit.page.locator(".verdicts .verdict > svg").count() == len(findings)


def test_the_marks_of_the_three_verdicts_are_of_different_shapes(study, tmp_path):
    def one_of_each(claims):
        for claim, verdict in zip(claims.values(), ("holds", "does not hold", "undecided"), strict=False):
            claim["findings"][0]["verdict"] = verdict

    text = write_report(changed(study, tmp_path, one_of_each)).read_text()
    opening = text[text.index('id="claims"') : text.index("</header>")]
    shapes = dict(re.findall(r'class="verdict (\w+)">.*?<path d="([^"]+)"', opening, re.DOTALL))
    assert len(shapes) == len(set(shapes.values())) == 3


def test_a_row_of_the_opening_table_leads_to_its_section(visit):
    link = visit.page.locator(".verdicts a").nth(3)
    link.click()
    assert visit.page.url.endswith("#claim-regularization")
    assert visit.page.locator(":target").inner_text() == link.inner_text()


def test_a_verdict_about_one_subject_alone_takes_both_columns(report):
    widths = {claim.key: [width for _, width, _ in claim.cells] for claim in report.claims}
    assert widths["claim-inputs"] == widths["claim-placement"] == [2]
    assert widths["claim-stability"] == [1, 1]


def test_the_tests_of_a_finding_are_given_alone_and_corrected(study, tmp_path):
    def one(claims):
        claims["stability"]["findings"][0] |= {"p_holds": 0.0004, "adjusted_holds": 0.0123, "p_fails": None}

    finding = section(report_data(changed(study, tmp_path, one)), "stability").findings[0]
    assert (finding.p_holds, finding.p_fails) == ("< 0.001, 0.012", "not tested")


def test_a_claim_has_its_figures_and_they_have_findings_and_tables_without_a_gap(report):
    assert {claim.key.removeprefix("claim-"): [f.key for f in claim.figures] for claim in report.claims} == FIGURES
    for claim in report.claims:
        for figure in claim.figures:
            assert figure.finding.endswith(".")
            assert figure.table.rows
            assert {len(row) for row in figure.table.rows} == {len(figure.table.columns)}


def test_no_figure_is_drawn_twice(report):
    keys = [drawing["key"] for drawing in report.drawings]
    assert len(keys) == len(set(keys))


@pytest.mark.parametrize("name", [name for name in CLAIMS if name != "fewer_steps"])
def test_a_claim_that_could_not_be_measured_keeps_its_sentence_and_has_no_figure(study, tmp_path, name):
    found = section(report_data(changed(study, tmp_path, lambda claims: claims[name].update(details=None))), name)
    assert found.figures == []
    assert found.sentence


def test_a_study_read_back_from_disk_gives_the_same_page_as_the_one_in_memory(study, page_path):
    text = page_path.read_text()
    assert write_report(read_run(study.folder)).read_text() == text


# What the figures show.


def test_shares_that_train_are_those_counted_over_the_runs(study, report):
    details = details_of(study, "stability")
    stacks = [
        stack for stack in run_json(study)["stacks"] if stack["phase"] == "stability" and stack["arm"] == "before"
    ]
    runs = [run for stack in stacks for run in stack["runs"]]
    plot = figure_of(report, "stability").plots[0]
    drawn = next(series for series in plot.series if series.group == "before")
    for rate, share in zip(details["rates"], drawn.y, strict=True):
        here = [run for run in runs if run["learning_rate"] == rate]
        ends = [np.mean(run["validation_score"][-3:]) for run in here if run["diverged_at"] is None]
        assert share == sum(end >= details["threshold"] for end in ends) / len(here)


def test_initial_weights_whose_runs_do_not_arrive_lie_beyond_the_steps_trained(study, tmp_path):
    def never(claims):
        claims["initial_weights"]["details"]["arrivals"]["none"][0] = [None] * SETTINGS.seeds

    details = details_of(study, "initial_weights")
    plot = figure_of(report_data(changed(study, tmp_path, never)), "initial_weights").plots[2]
    marks = next(series for series in plot.series if series.group == "none" and series.marks)
    assert marks.marks[0] == "beyond"
    assert marks.y[0] > details["steps"]


def test_a_line_joins_the_two_runs_of_a_seed(study, report):
    steps = details_of(study, "placement")["steps"]
    lines, before, after = figure_of(report, "placements").plots[0].series
    assert [lines.y[i::3] for i in (0, 1)] == [list(before.y), list(after.y)]
    assert [y for y, step in zip(before.y, steps["before"], strict=True) if step] == [s for s in steps["before"] if s]


def test_a_layer_is_drawn_at_every_probe_over_bins_that_stay_as_they_are(study, report):
    probes = details_of(study, "shift")["probes"]
    for plot in figure_of(report, "layers").plots:
        of_layer = [series for series in plot.series if series.choice["layer"] == "1" and not series.faint]
        assert [series.choice["step"] for series in of_layer] == [str(i) for i in range(len(probes))]
        assert len({tuple(series.x) for series in of_layer}) == 1


def test_the_bins_of_a_layer_hold_nearly_all_of_its_distribution_at_every_probe(report):
    for plot in figure_of(report, "layers").plots:
        for series in plot.series:
            assert sum(series.y) * (series.x[1] - series.x[0]) > 0.94


def test_the_chain_of_the_sub_networks_names_all_layers(report):
    chain = figure_of(report, "subnetworks").chain
    assert chain[1:4:2] == ["P1: hidden layer 1", "P2: hidden layer 2 and output layer"]


# Its data.


def test_every_claim_offers_its_data_under_a_plain_name(report):
    names = [file.name for claim in report.claims for file in claim.downloads]
    assert len(names) == len(set(names))
    assert all(re.fullmatch(r"[\w.-]+-[\w.-]+\.csv", name) for name in names)
    assert {name.removeprefix("script-img-src-x-onerror-alert-1-") for name in names} >= {
        "fewer-steps.csv", "stability.csv", "inputs.csv", "shift-layers.csv", "shift-pairs.csv",
    }  # fmt: skip


def test_the_data_of_stability_hold_every_score(study, report):
    scores = details_of(study, "stability")["scores"]
    rows = [row for row in rows_of(section(report, "stability").downloads[0]) if row["quantity"] == "score at the end"]
    for arm in ARMS:
        expected = [score for at in scores[arm] for score in at]
        assert [float(row["value"]) for row in rows if row["arm"] == arm] == pytest.approx(expected, rel=1e-8)


def test_the_pairs_behind_the_verdicts_are_all_given(study, report):
    for claim, found in zip(read_judgment(study).claims, report.claims, strict=True):
        pairs = [pair for finding in claim.findings for pair in finding.pairs]
        rows = rows_of(found.downloads[-1])
        assert [[float(row["at least"]), float(row["at most"])] for row in rows] == [
            pytest.approx(pair, rel=1e-8) for pair in pairs
        ]


def test_a_link_saves_the_data_as_a_file_without_a_request(visit, report):
    file = section(report, "shift").downloads[0]
    with visit.page.expect_download() as saved:
        visit.page.click(f"a[download='{file.name}']")
    assert saved.value.suggested_filename == file.name
    assert saved.value.path().read_text() == file.data.csv()


# How it is used.


def test_the_page_opens_without_a_complaint_and_asks_no_host_for_anything(open_report, page_path):
    visit = open_report(page_path)
    assert visit.complaints == []
    assert [url for url in visit.requests if not url.startswith("data:")] == [page_path.as_uri()]


def test_names_from_the_users_file_are_shown_as_text_and_never_run(visit, page_path):
    assert NASTY not in page_path.read_text()
    assert visit.page.locator("img").count() == 0
    assert NASTY in visit.page.inner_text("#figure-contours")


def diverge(claims):
    """Let the runs without batch norm diverge at the fourth probe."""
    shift, stable = claims["shift"]["details"], claims["stability"]["details"]
    for by_layer in (shift["drift"]["none"], [shift["gradient"]["none"]]):
        for band in by_layer:
            band |= {name: ["inf"] * len(shift["probes"]) for name in ("median", "low", "high")}
    for by_probe in shift["distributions"]["quantiles"]["none"]:
        by_probe[3:] = [[None] * 41 for _ in by_probe[3:]]
    shift["outputs"]["rows"]["none"] = [[[None, None] for _ in rows] for rows in shift["outputs"]["rows"]["none"]]
    stable["scores"]["none"] = [[None] * SETTINGS.seeds for _ in stable["rates"]]
    stable["loss_change"]["none"]["change"]["high"] = ["inf"] * len(stable["loss_change"]["none"]["steps"])


def test_runs_that_diverged_are_drawn_without_a_complaint(study, open_report, tmp_path):
    assert open_report(write_report(changed(study, tmp_path, diverge))).complaints == []


def test_figures_of_a_run_that_diverged_say_so(study, tmp_path):
    report = report_data(changed(study, tmp_path, diverge))
    for figure in ("layers", "subnetworks"):
        assert "out of bounds without batch norm" in figure_of(report, figure).finding
    assert "not finite without batch norm" in figure_of(report, "drift").finding


def test_no_distribution_is_drawn_of_a_run_that_has_diverged(study, tmp_path):
    plot = figure_of(report_data(changed(study, tmp_path, diverge)), "layers").plots[0]
    assert {series.choice["step"] for series in plot.series if not series.faint} == {"0", "1", "2"}


def test_inputs_that_do_not_move_are_drawn_on_a_logarithmic_axis_without_a_complaint(study, open_report, tmp_path):
    def halt(claims):
        for band in claims["shift"]["details"]["drift"]["none"]:
            band |= {name: [0.0] * len(values) for name, values in band.items()}

    assert open_report(write_report(changed(study, tmp_path, halt))).complaints == []


@pytest.fixture
def slider(visit):
    """The slider of the layers' distributions, at the end where it starts."""
    slider = visit.page.locator("#layers-step")
    slider.focus()
    visit.page.keyboard.press("End")
    return slider


def height(visit):
    return visit.drawn("layers", 1)[-1]["y"]


def test_a_slider_is_moved_with_the_keyboard_and_says_where_it_is(visit, slider, study):
    probes = details_of(study, "shift")["probes"]
    last = height(visit)
    visit.page.keyboard.press("Home")
    visit.page.keyboard.press("ArrowRight")
    assert slider.get_attribute("aria-valuetext") == f"step {probes[1]}"
    assert visit.page.inner_text("#figure-layers output") == f"step {probes[1]}"
    assert height(visit) != last


def test_a_slider_is_moved_with_the_mouse(visit, slider, study):
    box = slider.bounding_box()
    slider.click(position={"x": box["width"] / 2, "y": box["height"] / 2})
    at = int(slider.input_value())
    assert 0 < at < int(slider.get_attribute("max"))
    assert visit.page.inner_text("#figure-layers output") == f"step {details_of(study, 'shift')['probes'][at]}"


@pytest.mark.parametrize("figure", ["layers", "subnetworks"])
def test_the_axes_stay_as_they_are_while_a_slider_moves(visit, figure):
    visit.page.locator(f"#{figure}-step").focus()
    ranges = []
    for key in ("End", "Home"):
        visit.page.keyboard.press(key)
        ranges.append([visit.axis(figure, name, plot)["range"] for name in "xy" for plot in range(3)])
    assert ranges[0] == ranges[1]


def test_a_button_shows_another_layer_in_limits_of_its_own(visit, slider):
    last, limits = height(visit), visit.axis("layers", "x", 1)["range"]
    visit.press("layers", "layer", "0")
    first, others = height(visit), visit.axis("layers", "x", 1)["range"]
    visit.press("layers", "layer", "1")
    assert first != last
    assert others != limits
    assert height(visit) == last


def test_the_play_button_goes_from_the_first_step_to_the_last_and_stops(visit, slider):
    play = visit.page.locator("#figure-layers .play")
    play.click()
    assert play.inner_text() == "Pause"
    assert int(slider.input_value()) < int(slider.get_attribute("max"))
    visit.page.wait_for_selector("#figure-layers .play:text('Play')")
    assert slider.input_value() == slider.get_attribute("max")


def test_the_play_button_pauses_and_goes_on_from_there(visit, slider):
    visit.page.keyboard.press("Home")
    play = visit.page.locator("#figure-layers .play")
    play.focus()
    visit.page.keyboard.press("Enter")
    visit.page.wait_for_timeout(600)
    visit.page.keyboard.press("Enter")
    paused = int(slider.input_value())
    visit.page.wait_for_timeout(600)
    assert 0 < int(slider.input_value()) == paused
    play.click()
    assert int(slider.input_value()) >= paused
    play.click()


def test_where_motion_is_to_be_reduced_the_button_takes_one_step(open_report, page_path):
    visit = open_report(page_path, reduced_motion="reduce")
    button, slider = visit.page.locator("#figure-layers .play"), visit.page.locator("#layers-step")
    assert button.inner_text() == "Next"
    button.click()
    visit.page.wait_for_timeout(600)
    assert slider.input_value() == "0"
    button.click()
    assert slider.input_value() == "1"


def test_an_arm_taken_out_elsewhere_is_still_drawn_where_no_key_could_put_it_back(visit, slider):
    key = visit.page.locator("#figure-race .key[data-group=none]")
    key.click()
    assert len(visit.drawn("layers", 0)) > 0
    assert len(visit.drawn("stability", 2)) == 4
    key.click()


def test_every_control_is_reached_with_the_keyboard_and_shows_that_it_is(visit):
    wanted = visit.page.evaluate(
        "() => { const all = [...document.querySelectorAll('button, input, a[href], summary')];"
        " all.forEach((one, i) => { one.dataset.number = i; }); document.activeElement.blur(); return all.length; }"
    )
    seen = {}
    for _ in range(wanted + 60):
        visit.page.keyboard.press("Tab")
        number, outline = visit.page.evaluate(
            "() => [document.activeElement.dataset.number, getComputedStyle(document.activeElement).outlineStyle]"
        )
        seen[number] = outline
    assert {str(i) for i in range(wanted)} <= set(seen)
    assert "none" not in {outline for number, outline in seen.items() if number is not None}


@pytest.mark.parametrize("color_scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1440])
def test_axe_finds_no_fault(open_report, page_path, axe_source, width, color_scheme):
    visit = open_report(page_path, width=width, color_scheme=color_scheme)
    visit.page.evaluate("document.querySelector('details').open = true")  # one table of numbers is like another
    visit.page.evaluate(axe_source)
    found = visit.page.evaluate("axe.run({ exclude: ['.plot'] })")["violations"]  # images, which have their labels
    assert [(fault["id"], [node["target"] for node in fault["nodes"]]) for fault in found] == []


def test_a_phone_of_360_pixels_shows_the_page_without_scrolling_sideways(open_report, page_path):
    visit = open_report(page_path, width=360)
    assert visit.page.evaluate("document.documentElement.scrollWidth") == 360
    wide = "[...document.querySelectorAll('.plot .main-svg')].filter((svg) => svg.getBoundingClientRect().right > 360)"
    assert visit.page.evaluate(wide + ".length") == 0


@pytest.mark.parametrize("width", [360, 1440])
def test_printed_figures_fit_paper_and_their_places(open_report, page_path, width):
    visit = open_report(page_path, width=width)
    visit.page.evaluate("dispatchEvent(new Event('beforeprint'))")
    rows = visit.page.evaluate(
        "() => { const box = (one) => one.getBoundingClientRect().toJSON();"
        " return [...document.querySelectorAll('.plots')].map((row) => [box(row).left,"
        " [...row.querySelectorAll('.plot')].map((plot) => [box(plot), box(plot.querySelector('.main-svg'))])]); }"
    )
    for left, plots in rows:
        assert max(svg["right"] for _, svg in plots) - left <= 680
        assert all(place["width"] == svg["width"] and place["height"] == svg["height"] for place, svg in plots)


def test_a_dark_screen_prints_in_the_colors_of_paper_and_is_dark_again(visit, open_report, page_path):
    dark = open_report(page_path, color_scheme="dark")
    on_screen = dark.lines("race")
    dark.page.evaluate("dispatchEvent(new Event('beforeprint'))")
    printed = dark.lines("race")
    dark.page.evaluate("dispatchEvent(new Event('afterprint'))")
    assert printed == visit.lines("race") != on_screen
    assert dark.lines("race") == on_screen
