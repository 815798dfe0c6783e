"""Small studies: the stacks and the measurements of each claim, and their repeatability."""

import copy
import json
import math
from dataclasses import replace

import numpy as np
import pytest

from batchnorm.lab.claims import CLAIMS, ClaimTests, read_judgment
from batchnorm.lab.comparison.conduct import compare
from batchnorm.lab.comparison.run_file import RunFile, read_run
from batchnorm.lab.data.dataset import prepare
from batchnorm.lab.data.tables import read_table
from batchnorm.lab.report.terminal import Silence
from batchnorm.lab.training.records import Records
from batchnorm.lab.training.settings import ARMS, Settings

SETTINGS = Settings(hidden=(8, 6), steps=48, batch_size=40, search_seeds=1, seeds=5, learning_rates=(0.1, 1.0))
ALL = list(CLAIMS)


@pytest.fixture(scope="module")
def digits():
    return prepare(read_table("digits"))


def study(folder, dataset, settings=SETTINGS, claims=ALL, jobs=1, run=None, progress=None):
    if run is None:
        folder.mkdir(exist_ok=True)
        run = RunFile.create(folder, dataset.describe(), settings)
    extension = ClaimTests(claims) if claims else None
    compare(dataset, run, jobs=jobs, progress=progress or Silence(), extension=extension)
    return run


@pytest.fixture(scope="module")
def finished(tmp_path_factory, digits):
    return study(tmp_path_factory.mktemp("study"), digits)


def claim_of(run, name):
    return next(claim for claim in read_judgment(run).claims if claim.name == name)


def raw(run, phase, arm):
    """Runs as run.json has them, in the order of rates and seeds, without the library's reader."""
    content = json.loads((run.folder / "run.json").read_text())
    stacks = [stack for stack in content["stacks"] if (stack["phase"], stack["arm"]) == (phase, arm)]
    runs = [values for stack in stacks for values in stack["runs"]]
    return sorted(runs, key=lambda values: (values["learning_rate"], values["seed"]))


def without_times(content):
    """The content of run.json that must be the same in every repetition."""
    content = copy.deepcopy(content)
    for name in ("created", "seconds", "machine", "status"):
        content.pop(name)
    for stack in content["stacks"]:
        stack.pop("seconds")
    content["stacks"].sort(key=lambda stack: stack["key"])
    result = content["result"]
    result.pop("stacking")
    for values in result["arms"].values():
        values.pop("seconds_per_step")
    for ratio in result["ratios"].values():
        ratio.pop("seconds")
    for claim in result["claims"]:
        claim["findings"] = [finding for finding in claim["findings"] if finding["family"] == "steps"]
        if claim["name"] == "fewer_steps":
            claim.pop("sentence")
    return content


def test_every_claim_has_its_question_design_sentence_and_findings(finished):
    claims = read_judgment(finished).claims
    assert [claim.name for claim in claims] == list(CLAIMS)
    for claim in claims:
        assert claim.question.endswith("?")
        assert claim.design.endswith(".")
        assert claim.findings
        assert all(finding.verdict in claim.sentence for finding in claim.findings)


def test_only_the_stacks_of_the_given_claims_are_trained(tmp_path, digits):
    run = study(tmp_path / "weights", digits, claims=["initial_weights"])
    phases = {stack.phase for stack in run.stacks}
    assert {"initial scale x 0.001", "initial scale x 100"} <= phases
    assert not phases & {"stability", "shift"}
    assert [claim.name for claim in read_judgment(run).claims] == ["initial_weights"]
    assert all(trained.record == Records() for stack in run.stacks for trained in stack.runs)


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_repeated_study_gives_the_same_run_json_but_for_times_whatever_the_jobs(finished, tmp_path, digits, jobs):
    again = study(tmp_path / "again", digits, jobs=jobs)
    read = [json.loads((run.folder / "run.json").read_text()) for run in (finished, again)]
    assert without_times(read[0]) == without_times(read[1])


def test_a_resumed_study_has_the_same_result(finished, tmp_path, digits):
    folder = tmp_path / "stopped"
    partial = copy.deepcopy(json.loads((finished.folder / "run.json").read_text()))
    kept = [stack for stack in partial["stacks"] if not stack["phase"].startswith(("stability", "shift"))]
    folder.mkdir()
    (folder / "run.json").write_text(json.dumps(partial | {"stacks": kept, "status": "interrupted", "result": None}))
    run = study(folder, digits, run=read_run(folder))
    read = [json.loads((run.folder / "run.json").read_text()) for run in (finished, run)]
    assert without_times(read[0]) == without_times(read[1])


def test_a_seed_trains_over_a_decade_per_rate_at_which_it_ends_above_the_threshold(finished):
    details = claim_of(finished, "stability").details
    for arm in ARMS:
        runs = raw(finished, "stability", arm)
        assert {values["seed"] for values in runs} == {1, 2, 3, 4, 5}
        for i, seed in enumerate(range(1, 6)):
            ends = [
                np.mean(values["validation_score"][-3:])
                for values in runs
                if values["seed"] == seed and values["diverged_at"] is None
            ]
            above = sum(end >= details.threshold for end in ends)
            assert details.width[arm][i] == pytest.approx(above * math.log10(1.0 / 0.1))
    pairs = claim_of(finished, "stability").findings[0].pairs
    expected = np.subtract(details.width["before"], details.width["none"])
    np.testing.assert_allclose(pairs, np.stack([expected, expected], axis=1))


def test_the_threshold_is_halfway_from_a_constant_guess_to_the_best_score(finished, digits):
    train, validation = (digits.y[digits.parts[part]] for part in ("train", "validation"))
    constant = np.mean(validation == np.bincount(train).argmax())
    best = max(
        max(np.median([max(v["validation_score"]) for v in raw(finished, "search", arm) if v["learning_rate"] == rate])
            for rate in (0.1, 1.0))
        for arm in ARMS
    )  # fmt: skip
    assert claim_of(finished, "stability").details.threshold == pytest.approx((constant + best) / 2)


def test_initial_weights_are_scaled_by_their_factor(finished):
    """A network of all but no weights begins at the loss of an even guess."""
    small = raw(finished, "initial scale x 0.001", "none")
    large = raw(finished, "initial scale x 100", "none")
    assert all(values["train_loss"][0] == pytest.approx(math.log(10), rel=1e-3) for values in small)
    assert all(values["train_loss"][0] > 10 for values in large)


def test_the_gain_is_taken_at_the_least_training_loss_that_both_of_a_pair_reach(finished):
    finding = claim_of(finished, "regularization").findings[0]
    arms = {arm: [values["record"]["gap"] for values in raw(finished, "confirm", arm)] for arm in ("none", "before")}
    for none, before, pair in zip(arms["none"], arms["before"], finding.pairs, strict=True):
        level = max(min(none["train_loss"]), min(before["train_loss"]))
        gaps = []
        for record in (none, before):
            at = next(i for i, loss in enumerate(record["train_loss"]) if loss <= level)
            gaps.append(record["train_score"][at] - record["test_score"][at])
        assert pair == (pytest.approx(gaps[0] - gaps[1]),) * 2


def test_drift_and_smoothness_are_compared_at_one_learning_rate_for_every_arm(finished):
    details = claim_of(finished, "shift").details
    for arm in ARMS:
        assert {values["learning_rate"] for values in raw(finished, "shift", arm)} == {details.learning_rate}
    none, before = (
        [np.median(values["record"]["shift"]["drift"]) for values in raw(finished, "shift", arm)]
        for arm in ("none", "before")
    )
    pairs = claim_of(finished, "shift").findings[0].pairs
    np.testing.assert_allclose([low for low, _ in pairs], np.divide(none, before), rtol=1e-9)


def test_on_shuffled_labels_everything_is_undecided_with_a_reason(tmp_path, digits):
    shuffled = replace(digits, y=np.random.default_rng(0).permutation(digits.y))
    run = study(tmp_path / "shuffled", shuffled)
    findings = [finding for claim in read_judgment(run).claims for finding in claim.findings]
    assert {finding.verdict for finding in findings} == {"undecided"}
    assert all("constant guess" in finding.reason for finding in findings)


def test_an_arm_against_itself_shares_the_search_and_confirms_with_its_own_seeds(tmp_path, digits):
    settings = replace(SETTINGS, null_arm="before")
    run = study(tmp_path / "itself", digits, settings, claims=[])

    def losses(phase):
        return [[values["train_loss"] for values in raw(run, phase, arm)] for arm in ARMS]

    assert losses("search")[0] == losses("search")[1] == losses("search")[2]
    confirmed = losses("confirm")
    assert all(a != b for one in range(3) for a, b in zip(confirmed[one], confirmed[one - 1], strict=True))


def test_on_few_validation_rows_only_steps_are_not_judged(tmp_path):
    dataset = prepare(read_table("wine"))
    run = study(tmp_path / "wine", dataset, replace(SETTINGS, steps=80))
    for name in ("fewer_steps", "placement"):
        for finding in claim_of(run, name).findings:
            assert finding.reason == "on 36 validation rows no ratio of steps is claimed"
    assert all(finding.p_holds is not None for finding in claim_of(run, "initial_weights").findings)


def test_a_study_works_for_regression(tmp_path):
    dataset = prepare(read_table("diabetes"))
    run = study(tmp_path / "diabetes", dataset, replace(SETTINGS, learning_rates=(0.01, 0.1)))
    details = claim_of(run, "inputs").details
    assert set(details.columns) <= set(dataset.features)
    assert len(read_judgment(run).claims) == 7


def test_the_keys_of_the_stacks_are_unique(finished):
    keys = [stack.key for stack in finished.stacks]
    assert len(keys) == len(set(keys))
