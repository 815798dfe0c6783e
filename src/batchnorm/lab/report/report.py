"""report.html: what a comparison found, in one file that works offline, drawn from run.json."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined
from plotly.offline import get_plotlyjs

from batchnorm.lab.comparison.measures import CONFIDENCE, FEWEST_VALIDATION_ROWS, SHARE_OF_BEST
from batchnorm.lab.comparison.result import MedianRatio, Ratio
from batchnorm.lab.comparison.run_file import RunFile
from batchnorm.lab.comparison.verdict import difference_text, number, ratio_text, steps_text
from batchnorm.lab.files import write_file
from batchnorm.lab.report import figures
from batchnorm.lab.report.claim_sections import ClaimSection, claim_sections
from batchnorm.lab.report.figures import GROUPS, LABELS, Evidence, Figure
from batchnorm.lab.training.runs import CONSECUTIVE, median_steps
from batchnorm.lab.training.settings import ARMS, Arm

__all__ = ["FILE", "Report", "Row", "Section", "figure_html", "report_data", "report_html", "write_report"]

FILE = "report.html"
SOON = "not yet"


@dataclass(frozen=True)
class Row:
    """An arm's row of the table, in words."""

    arm: str
    label: str
    learning_rate: str
    steps: str
    seeds: str
    ratio: str
    seconds_ratio: str
    rates_that_reach: str
    test_score: str
    test_difference: str


@dataclass(frozen=True)
class Section:
    """A heading of the report and the figures under it."""

    key: str
    title: str
    figures: list[Figure]


@dataclass(frozen=True)
class Report:
    """Everything that the report says, apart from its HTML."""

    name: str
    verdict: str
    caveat: str | None
    unfinished: list[str]
    score_name: str
    claims: list[ClaimSection]
    power: dict[str, Any] | None
    rows: list[Row]
    sections: list[Section]
    method: dict[str, Any]
    set_up: list[tuple[str, str]]
    data: list[tuple[str, str]]
    made_with: list[tuple[str, str]]
    command: str | None
    seconds_a_step: dict[Arm, float] | None

    @property
    def figures(self) -> list[Figure]:
        """All its figures, in order."""
        drawn = [section.figures for section in self.claims] + [section.figures for section in self.sections]
        return [figure for figures_of in drawn for figure in figures_of]

    @property
    def drawings(self) -> list[dict[str, Any]]:
        """What the browser draws."""
        return [figure.drawing() for figure in self.figures]


def _row(evidence: Evidence, arm: Arm) -> Row:
    """An arm's row, as far as its runs are finished."""
    result, settings = evidence.result, evidence.settings
    values = result["arms"][arm] if result else None
    ratio = evidence.run_result.ratios.get(arm) if evidence.run_result else None
    arrivals = evidence.arrivals[arm] if result else []
    some = 0 < len(arrivals) < settings.seeds
    difference = ratio and ratio.test_difference
    return Row(
        arm=arm,
        label=LABELS[arm],
        learning_rate=f"{values['learning_rate']:g}" if values else SOON,
        steps=steps_text(median_steps(arrivals), settings.steps) if arrivals else SOON,
        seeds=f"{len(arrivals)} of {settings.seeds} seeds" if some else "",
        ratio=_times(evidence, arm, ratio),
        seconds_ratio=_times(evidence, arm, ratio and ratio.seconds),
        rates_that_reach=f"{values['rates_that_reach']} of {len(values['search'])}" if values else SOON,
        test_score=_test_score(values),
        test_difference=difference_text(difference) if difference else "",
    )


def _times(evidence: Evidence, arm: Arm, ratio: Ratio | MedianRatio | None) -> str:
    """Times fewer steps or seconds than without batch norm."""
    if arm == "none":
        return "1"
    if evidence.result and not evidence.result["headline"]:
        return "not claimed"
    return ratio_text(ratio) if ratio else SOON


def _test_score(values: dict[str, Any] | None) -> str:
    if not values or not values["test_scores"]:
        return SOON
    score = values["test_score"]
    return "diverged" if score is None or math.isnan(score) else f"{score:.3f}"


def _unfinished(run: RunFile, evidence: Evidence) -> list[str]:
    """What a run that is not complete lacks, and how to go on with it; nothing for one that is."""
    if run.content["status"] == "complete":
        return []
    finished = sum(len(stack["runs"]) for stack in run.content["stacks"])
    stage = "the search of learning rates" if evidence.result is None else "the runs that confirm and vary the result"
    return [
        f"This comparison was stopped during {stage}; its {finished} finished runs are kept and drawn here.",
        f"batchnorm compare --resume {run.folder}",
    ]


def _method(evidence: Evidence) -> dict[str, Any]:
    """Numbers of the method as it was applied."""
    settings, result = evidence.settings, evidence.result
    ratios = result["ratios"] if result else {}
    return {
        "grid": len(settings.grid),
        "search_seeds": settings.search_seeds,
        "seeds": settings.seeds,
        "steps": settings.steps,
        "share": SHARE_OF_BEST,
        "consecutive": CONSECUTIVE,
        "fewest_rows": FEWEST_VALIDATION_ROWS,
        "rows": evidence.data["rows"]["validation"],
        "extended": settings.learning_rates is None,
        "asked": settings.target_score,
        "rule": evidence.target.rule if evidence.target else None,
        "confidence": f"{ratios['before']['confidence']:.1%}" if ratios and result and result["headline"] else None,
        "test_confidence": f"{CONFIDENCE:.0%}",
        "score": evidence.score_name,
    }


def _seeds(first: int, count: int) -> str:
    return f"{first}" if count == 1 else f"{first} to {first + count - 1}"


def _set_up(evidence: Evidence) -> list[tuple[str, str]]:
    """The settings in words."""
    settings, result = evidence.settings, evidence.result
    init = settings.init or f"{'he' if settings.activation == 'relu' else 'xavier'} (the default)"
    grid = result["grid"] if result else settings.grid
    return [
        ("hidden layers", ", ".join(str(units) for units in settings.hidden) + " units"),
        ("nonlinearity", settings.activation),
        ("optimizer", "gradient descent" if settings.optimizer == "sgd" else "Adam"),
        ("batch size", str(settings.batch_size)),
        ("steps", str(settings.steps)),
        ("initial weights", init + ("" if settings.init_scale == 1 else f", times {settings.init_scale:g}")),
        ("inputs", settings.inputs),
        ("learning rates searched", ", ".join(f"{rate:g}" for rate in grid)),
        ("target", evidence.target.rule if evidence.target else SOON),
        ("seed of the split and of all that is random", str(settings.seed)),
        ("seeds of the search", _seeds(0, settings.search_seeds)),
        ("seeds that confirm", _seeds(settings.search_seeds, settings.seeds)),
    ]


def _data(data: dict[str, Any]) -> list[tuple[str, str]]:
    """The data in words; names are as the user's file has them."""
    rows = data["rows"]
    lines = [
        (
            "rows",
            f"{rows['train']} to train on, {rows['validation']} to choose and count on, {rows['test']} to test on",
        ),
        ("to predict", f"{data['target']} ({data['task']})"),
        ("features", f"{len(data['features'])}: {', '.join(data['features'])}"),
    ]
    if data["classes"]:
        lines.append(("classes", f"{len(data['classes'])}: {', '.join(data['classes'])}"))
    lines += [("left out", f"{left['column']}: {left['reason']}") for left in data["left_out"]]
    lines += [("note", note) for note in data["notes"]]
    return [*lines, ("SHA-256 of the numbers", data["sha256"])]


def _made_with(content: dict[str, Any], evidence: Evidence) -> list[tuple[str, str]]:
    """Versions, machine and time."""
    machine = content["machine"]
    lines = [
        ("versions", ", ".join(f"{name} {version}" for name, version in content["versions"].items())),
        ("machine", f"{machine['processor']}, {machine['cores']} cores, {machine['system']}"),
        ("Python", machine["python"]),
        ("started", content["created"]),
    ]
    if content["seconds"] is not None:
        lines.append(("time taken", f"{content['seconds']:.0f} s"))
    stacking = evidence.result and evidence.result["stacking"]
    if stacking:
        lines.append(
            (
                "training in stacks",
                f"{stacking['runs']} runs took {stacking['together']:.0f} s of a core; one after another they would "
                f"have taken {stacking['alone']:.0f} s, {number(stacking['factor'])} times as long",
            )
        )
    return lines


def _sections(evidence: Evidence, claims: list[ClaimSection]) -> list[Section]:
    """The figures that there are runs for, under their headings; the race, unless a claim shows it."""
    if not evidence.arms:
        return []
    raced = any(figure.key == "race" for claim in claims for figure in claim.figures)
    planned: list[tuple[str, str, list[Figure | None]]] = [
        ("race", "The race", [None if raced else figures.race(evidence)]),
        (
            "changes",
            "What would change this answer",
            [figures.variants(evidence), figures.learning_rates(evidence), figures.moving_target(evidence)],
        ),
        ("training", "Loss and score", [figures.curves(evidence), figures.every_score(evidence)]),
        ("inside", "Inside the network", [figures.last_inputs(evidence)]),
    ]
    sections = [Section(key, title, [figure for figure in drawn if figure]) for key, title, drawn in planned]
    return [section for section in sections if section.figures]


def report_data(run: RunFile) -> Report:
    """What the report of a run says, finished or not."""
    evidence = Evidence(run)
    result, data = evidence.result or {}, evidence.data
    claims = claim_sections(evidence)
    return Report(
        name=data["name"],
        verdict=result.get("verdict")
        or f"The comparison on {data['name']} is not finished, so there is no verdict yet.",
        caveat=result.get("caveat"),
        unfinished=_unfinished(run, evidence),
        score_name=evidence.score_name,
        claims=claims,
        power=result.get("power"),
        rows=[_row(evidence, arm) for arm in ARMS],
        sections=_sections(evidence, claims),
        method=_method(evidence),
        set_up=_set_up(evidence),
        data=_data(data),
        made_with=_made_with(run.content, evidence),
        command=run.content.get("command"),
        seconds_a_step=evidence.seconds,
    )


def _page(template: str, drawings: Sequence[Any], seconds: Mapping[Arm, float] | None, **shown: Any) -> str:
    """A template of a page with figures, filled in."""
    templates = Environment(
        loader=ChoiceLoader([PackageLoader("batchnorm.lab.report"), PackageLoader("batchnorm.lab")]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
    )
    templates.policies["json.dumps_kwargs"] = {"sort_keys": True, "separators": (",", ":")}
    embedded = {"labels": GROUPS, "seconds": seconds, "figures": drawings}
    return templates.get_template(template).render(embedded=embedded, plotly=get_plotlyjs(), **shown)


def report_html(run: RunFile) -> str:
    """The report of a run as a page that works offline."""
    report = report_data(run)
    return _page("report.html", report.drawings, report.seconds_a_step, report=report)


def figure_html(figure: Figure, seconds: Mapping[Arm, float] | None) -> str:
    """A figure of a report as a page of its own; ``seconds`` are those of a step of each arm, once measured."""
    return _page("figure.html", [figure.drawing()], seconds, figure=figure)


def write_report(run: RunFile) -> Path:
    """Write report.html beside the run.json of a run, whole or not at all; returns its path."""
    path = run.folder / FILE
    write_file(path, report_html(run))
    return path
