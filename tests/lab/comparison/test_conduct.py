"""Small comparisons: their plan, their pairs, their repeatability, and resuming them."""

import copy
import json
import math
from dataclasses import asdict, dataclass, replace

import pytest

from batchnorm.lab.comparison.conduct import compare, fit_to_data
from batchnorm.lab.comparison.measures import ratio_bounds
from batchnorm.lab.comparison.phases import variants
from batchnorm.lab.comparison.run_file import RunFile, read_run
from batchnorm.lab.data.dataset import prepare
from batchnorm.lab.data.tables import read_table
from batchnorm.lab.report.terminal import Silence
from batchnorm.lab.training.runs import evaluation_steps, steps_to
from batchnorm.lab.training.settings import ARMS, Settings
from batchnorm.lab.training.stacks import cut

SETTINGS = Settings(hidden=(8,), steps=40, search_seeds=2, seeds=3, learning_rates=(0.1, 0.3, 1.0))


class Counter(Silence):
    """Progress that is counted."""

    def __init__(self, stop_after=math.inf):
        self.planned = dict.fromkeys(ARMS, 0)
        self.taken = dict.fromkeys(ARMS, 0)
        self.said = []

    def plan(self, arm, steps):
        self.planned[arm] += steps

    def advance(self, arm, steps):
        self.taken[arm] += steps

    def say(self, sentence):
        self.said.append(sentence)


@pytest.fixture(scope="module")
def digits():
    return prepare(read_table("digits"))


def new_run(folder, settings, dataset):
    folder.mkdir()
    return RunFile.create(folder, dataset.describe(), settings)


def without_times(run):
    """The content of run.json that must be the same in every repetition."""
    content = json.loads((run.folder / "run.json").read_text())
    for name in ("created", "seconds", "machine", "result", "status"):
        content.pop(name)
    for stack in content["stacks"]:
        stack.pop("seconds")
    content["stacks"].sort(key=lambda stack: stack["key"])
    return content


@pytest.fixture(scope="module")
def finished(tmp_path_factory, digits):
    """A finished comparison: its progress, its run.json and its result."""
    run = new_run(tmp_path_factory.mktemp("compare") / "run", SETTINGS, digits)
    counter = Counter()
    result = compare(digits, run, jobs=1, progress=counter)
    return counter, read_run(run.folder), result


def test_all_the_planned_steps_are_counted_as_taken(finished):
    counter, run, _ = finished
    for arm in ARMS:
        stacks = [stack for stack in run.stacks if stack.arm == arm]
        half = sum(len(stack.runs) for stack in stacks if stack.phase.startswith("variant"))
        assert 2 * (2 * 2) <= half <= 2 * (3 * 2)  # two variants, two seeds, at two rates or three
        assert counter.planned[arm] == counter.taken[arm] == (3 * 2 + 3) * 40 + half * 20


def test_every_rate_is_searched_with_every_search_seed_and_confirmed_with_fresh_ones(finished):
    _, run, result = finished
    for arm in ARMS:
        searched = {(r.learning_rate, r.seed) for r in run.runs("search", arm)}
        assert searched == {(rate, seed) for rate in (0.1, 0.3, 1.0) for seed in (0, 1)}
        confirmed = [(r.learning_rate, r.seed) for r in run.runs("confirm", arm)]
        assert confirmed == [(result.arms[arm].learning_rate, seed) for seed in (2, 3, 4)]


def test_the_result_follows_from_the_runs(finished):
    _, run, result = finished
    evaluations = evaluation_steps(SETTINGS.steps)
    target = result.target
    steps = {arm: [steps_to(r, target, evaluations) for r in run.runs("confirm", arm)] for arm in ARMS}
    for arm in ARMS:
        assert result.arms[arm].steps == steps[arm]
        scores = [r.test.score for r in run.runs("confirm", arm)]
        assert result.arms[arm].test_score == pytest.approx(sum(scores) / 3)
    for arm in ARMS[1:]:
        pairs = [ratio_bounds(a, b, SETTINGS.steps) for a, b in zip(steps["none"], steps[arm], strict=True)]
        assert result.ratios[arm].pairs == pairs
    assert result.stacking.runs == sum(len(stack.runs) for stack in run.stacks)
    assert result.verdict.startswith("On digits ")


def test_only_confirming_runs_read_the_test_rows(finished):
    _, run, _ = finished
    for stack in run.stacks:
        assert all((trained.test is not None) == (stack.phase == "confirm") for trained in stack.runs)


def test_run_json_contains_the_result_and_the_status_complete(finished):
    _, run, result = finished
    content = json.loads((run.folder / "run.json").read_text())
    assert content["status"] == run.status == "complete"
    assert content["result"]["verdict"] == result.verdict
    assert (content["format"], content["version"]) == ("batchnorm-run", 2)
    assert run.result == result


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")  # loky's own, where Python warns of threads
def test_two_jobs_give_the_same_run_as_one_but_for_times(finished, tmp_path, digits):
    _, once, _ = finished
    again = new_run(tmp_path / "run", SETTINGS, digits)
    compare(digits, again, jobs=2, progress=Silence())
    assert without_times(again) == without_times(once)


def test_a_resumed_run_keeps_its_stacks_and_ends_as_an_uninterrupted_one(finished, tmp_path, digits, monkeypatch):
    _, once, _ = finished
    run = new_run(tmp_path / "run", SETTINGS, digits)
    saves = []
    save = RunFile.save

    def interrupted(self):
        save(self)
        saves.append(len(self.stacks))
        if saves[-1] == 4 and saves.count(4) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(RunFile, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        compare(digits, run, jobs=1, progress=Silence())
    monkeypatch.undo()
    half = read_run(run.folder)
    assert half.status == "interrupted"
    kept = copy.deepcopy(half.stacks)
    assert len(kept) == 4
    counter = Counter()
    compare(digits, half, jobs=1, progress=counter)
    whole = read_run(run.folder)
    assert whole.stacks[:4] == kept
    assert counter.planned == counter.taken
    assert without_times(whole) == without_times(once)


def test_a_best_rate_at_the_edge_of_the_default_grid_extends_it_once_for_all_arms(tmp_path, digits):
    # after 12 steps of a small step size nothing is learned, so the greatest rates of the grid are the best
    settings = replace(SETTINGS, learning_rates=None, steps=12, seeds=2, search_seeds=1, optimizer="adam")
    counter = Counter()
    result = compare(digits, new_run(tmp_path / "run", settings, digits), jobs=1, progress=counter)
    assert result.grid == [0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3]
    assert counter.said == ["The best learning rate is at the edge of the grid: 0.3 is tried too."]
    assert counter.planned == counter.taken
    assert all(len(values.search) == 8 for values in result.arms.values())


def test_a_baseline_that_always_diverges_is_the_verdict(tmp_path, digits):
    settings = replace(SETTINGS, activation="relu", learning_rates=(1e30,), search_seeds=1, steps=30)
    run = new_run(tmp_path / "run", settings, digits)
    result = compare(digits, run, jobs=1, progress=Silence())
    assert "diverged at every learning rate" in result.verdict
    assert not result.headline
    assert math.isnan(result.arms["none"].test_score)
    json.loads((run.folder / "run.json").read_text(), parse_constant=lambda name: pytest.fail(name))


def test_regression_is_compared_in_r_squared(tmp_path):
    data = prepare(read_table("diabetes"))
    run = new_run(tmp_path / "run", SETTINGS, data)
    result = compare(data, run, jobs=1, progress=Silence())
    assert result.score_name == "R2"
    assert not result.headline
    assert "89 validation rows" in result.caveat
    assert result.arms["before"].test_score < 1


def test_a_batch_larger_than_the_training_rows_is_reduced_with_a_note(digits):
    settings, note = fit_to_data(replace(SETTINGS, batch_size=5000), digits)
    assert settings.batch_size == 1078
    assert "5000 is reduced to the 1078 training rows" in note
    assert fit_to_data(SETTINGS, digits) == (SETTINGS, None)


def test_a_variant_differs_from_the_set_up_in_one_thing():
    for varied in variants(SETTINGS).values():
        before, after = asdict(SETTINGS), asdict(varied)
        assert after.pop("steps") == before.pop("steps") // 2
        assert sum(before[name] != after[name] for name in before) == 1


@dataclass(frozen=True)
class Extra:
    """An extension that is no claim: one further run, and its last score."""

    records = ("loss_change",)

    def stacks(self, study):
        return cut("extra", "extra", "none", [(study.chosen["none"], 9)], study.settings)

    def judge(self, study):
        (run,) = study.run.runs("extra")
        return Extra.Judgment(run.seed, run.validation_score[-1])

    @dataclass(frozen=True)
    class Judgment:
        seed: int
        last_score: float


def test_an_extension_trains_records_and_judges_more(tmp_path, digits):
    settings = replace(SETTINGS, seeds=1, search_seeds=1, learning_rates=(0.3,))
    run = new_run(tmp_path / "run", settings, digits)
    compare(digits, run, jobs=1, progress=Silence(), extension=Extra())
    read = read_run(run.folder)
    (extra,) = read.runs("extra", "none")
    assert read.extension == {"seed": 9, "last_score": extra.validation_score[-1]}
    assert read.result == run.result
    assert all(confirming.record.loss_change is not None for confirming in read.runs("confirm"))
