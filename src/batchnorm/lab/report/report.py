"""report.html: the result of a comparison in one file that works offline, drawn from run.json."""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined
from plotly.offline import get_plotlyjs

from batchnorm.lab.claims import read_judgment
from batchnorm.lab.claims.judgment import Power
from batchnorm.lab.comparison.measures import CONFIDENCE, MIN_VALIDATION_ROWS, SHARE_OF_BEST
from batchnorm.lab.comparison.result import ArmResult, MedianRatio, Ratio
from batchnorm.lab.comparison.run_file import RunFile
from batchnorm.lab.comparison.verdict import difference_text, number, ratio_text, steps_text
from batchnorm.lab.data.dataset import DataDescription
from batchnorm.lab.files import write_file
from batchnorm.lab.report import figures
from batchnorm.lab.report.claim_sections import ClaimSection, claim_sections
from batchnorm.lab.report.figures import GROUPS, LABELS, Evidence, Figure
from batchnorm.lab.training.runs import CONSECUTIVE, median_steps
from batchnorm.lab.training.settings import ARMS, Arm

__all__ = ["FILE", "ReportPage", "Row", "Section", "figure_html", "report_data", "report_html", "write_report"]

FILE = "report.html"
SOON = "not yet"


@dataclass(frozen=True)
class Row:
    """A row of the table in words: one arm."""

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
class Method:
    """The numbers of the method, as its description quotes them."""

    grid: int
    search_seeds: int
    seeds: int
    steps: int
    share: float
    consecutive: int
    fewest_rows: int
    rows: int
    extended: bool
    asked: float | None
    rule: str | None
    confidence: str | None
    test_confidence: str
    score: str


@dataclass(frozen=True)
class ReportPage:
    """The content of the report, apart from its HTML."""

    name: str
    verdict: str
    caveat: str | None
    unfinished: list[str]
    score_name: str
    claims: list[ClaimSection]
    power: Power | None
    rows: list[Row]
    sections: list[Section]
    method: Method
    set_up: list[tuple[str, str]]
    data: list[tuple[str, str]]
    made_with: list[tuple[str, str]]
    command: str | None
    seconds_per_step: dict[Arm, float] | None

    @property
    def figures(self) -> list[Figure]:
        """All figures, in order."""
        drawn = [section.figures for section in self.claims] + [section.figures for section in self.sections]
        return [figure for figures_of in drawn for figure in figures_of]

    @property
    def drawings(self) -> list[dict[str, object]]:
        """The figures as the browser draws them."""
        return [figure.drawing() for figure in self.figures]


def _row(evidence: Evidence, arm: Arm) -> Row:
    """Return the row of an arm, as far as its runs are finished."""
    result, settings = evidence.result, evidence.settings
    values = result.arms[arm] if result else None
    ratio = result.ratios.get(arm) if result else None
    arrivals = evidence.arrivals[arm] if result else []
    some = 0 < len(arrivals) < settings.seeds
    difference = ratio and ratio.test_difference
    return Row(
        arm=arm,
        label=LABELS[arm],
        learning_rate=f"{values.learning_rate:g}" if values else SOON,
        steps=steps_text(median_steps(arrivals), settings.steps) if arrivals else SOON,
        seeds=f"{len(arrivals)} of {settings.seeds} seeds" if some else "",
        ratio=_times(evidence, arm, ratio),
        seconds_ratio=_times(evidence, arm, ratio and ratio.seconds),
        rates_that_reach=f"{values.rates_that_reach} of {len(values.search)}" if values else SOON,
        test_score=_test_score(values),
        test_difference=difference_text(difference) if difference else "",
    )


def _times(evidence: Evidence, arm: Arm, ratio: Ratio | MedianRatio | None) -> str:
    """Return the ratio of steps or seconds, without batch norm over with it."""
    if arm == "none":
        return "1"
    if evidence.result and not evidence.result.headline:
        return "not claimed"
    return ratio_text(ratio) if ratio else SOON


def _test_score(values: ArmResult | None) -> str:
    if not values or not values.test_scores:
        return SOON
    return "diverged" if math.isnan(values.test_score) else f"{values.test_score:.3f}"


def _unfinished(run: RunFile, evidence: Evidence) -> list[str]:
    """Return the state of an incomplete run, and the command that resumes it if its data can be read again."""
    if run.status == "complete":
        return []
    finished = sum(len(stack.runs) for stack in run.stacks)
    stage = "the search of learning rates" if evidence.result is None else "the runs that confirm and vary the result"
    state = f"This comparison was stopped during {stage}; its {finished} finished runs are kept and drawn here."
    resume = [] if run.request.data is None else [f"batchnorm compare --resume {shlex.quote(str(run.folder))}"]
    return [state, *resume]


def _method(evidence: Evidence) -> Method:
    """Return the numbers of the method as it was applied."""
    settings, result = evidence.settings, evidence.result
    confidence = result.ratios["before"].confidence if result and result.ratios and result.headline else None
    return Method(
        grid=len(settings.grid),
        search_seeds=settings.search_seeds,
        seeds=settings.seeds,
        steps=settings.steps,
        share=SHARE_OF_BEST,
        consecutive=CONSECUTIVE,
        fewest_rows=MIN_VALIDATION_ROWS,
        rows=evidence.data.rows["validation"],
        extended=settings.learning_rates is None,
        asked=settings.target_score,
        rule=evidence.target.rule if evidence.target else None,
        confidence=None if confidence is None else f"{confidence:.1%}",
        test_confidence=f"{CONFIDENCE:.0%}",
        score=evidence.score_name,
    )


def _seeds(first: int, count: int) -> str:
    return f"{first}" if count == 1 else f"{first} to {first + count - 1}"


def _set_up(evidence: Evidence) -> list[tuple[str, str]]:
    """Return the settings in words."""
    settings, result = evidence.settings, evidence.result
    init = settings.init or f"{'he' if settings.activation == 'relu' else 'xavier'} (the default)"
    grid = result.grid if result else settings.grid
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
        ("seed of the split, weights and batch order", str(settings.seed)),
        ("seeds of the search", _seeds(0, settings.search_seeds)),
        ("seeds that confirm", _seeds(settings.search_seeds, settings.seeds)),
    ]


def _data(data: DataDescription) -> list[tuple[str, str]]:
    """Return the data in words, with the names of the user's file."""
    rows = data.rows
    lines = [
        (
            "rows",
            f"{rows['train']} to train on, {rows['validation']} to choose and count on, {rows['test']} to test on",
        ),
        ("to predict", f"{data.target} ({data.task})"),
        ("features", f"{len(data.features)}: {', '.join(data.features)}"),
    ]
    if data.classes:
        lines.append(("classes", f"{len(data.classes)}: {', '.join(data.classes)}"))
    lines += [("left out", f"{left.column}: {left.reason}") for left in data.left_out]
    lines += [("note", note) for note in data.notes]
    return [*lines, ("SHA-256 of the numbers", data.sha256)]


def _made_with(run: RunFile) -> list[tuple[str, str]]:
    """Return versions, machine and time."""
    machine = run.machine
    lines: list[tuple[str, str]] = [
        ("versions", ", ".join(f"{name} {version}" for name, version in run.versions.items())),
        ("machine", f"{machine['processor']}, {machine['cores']} cores, {machine['system']}"),
        ("Python", str(machine["python"])),
        ("started", run.created),
    ]
    if run.seconds is not None:
        lines.append(("time taken", f"{run.seconds:.0f} s"))
    stacking = run.result and run.result.stacking
    if stacking:
        lines.append(
            (
                "training in stacks",
                f"{stacking.runs} runs took {stacking.together:.0f} s of a core; one after another they would "
                f"have taken {stacking.alone:.0f} s, {number(stacking.factor)}x as long",
            )
        )
    return lines


def _sections(evidence: Evidence, claims: list[ClaimSection]) -> list[Section]:
    """Return the figures that have runs, under their headings; the race only if no claim shows it."""
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


def report_data(run: RunFile) -> ReportPage:
    """Return the content of the report of a run, finished or not."""
    evidence = Evidence(run)
    result, judgment, name = run.result, read_judgment(run), run.data.name
    claims = claim_sections(evidence, judgment.claims if judgment else [])
    verdict = result.verdict if result else None
    return ReportPage(
        name=name,
        verdict=verdict or f"The comparison on {name} is not finished, so there is no verdict yet.",
        caveat=result.caveat if result else None,
        unfinished=_unfinished(run, evidence),
        score_name=evidence.score_name,
        claims=claims,
        power=judgment.power if judgment else None,
        rows=[_row(evidence, arm) for arm in ARMS],
        sections=_sections(evidence, claims),
        method=_method(evidence),
        set_up=_set_up(evidence),
        data=_data(run.data),
        made_with=_made_with(run),
        command=run.command or None,
        seconds_per_step=evidence.seconds,
    )


def _page(template: str, drawings: Sequence[Any], seconds: Mapping[Arm, float] | None, **shown: Any) -> str:
    """Return the page of a template with figures."""
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
    """Return the report of a run as a page that works offline."""
    report = report_data(run)
    return _page("report.html", report.drawings, report.seconds_per_step, report=report)


def figure_html(figure: Figure, seconds: Mapping[Arm, float] | None) -> str:
    """Return a figure of a report as its own page; ``seconds`` are those per step of each arm, once measured."""
    return _page("figure.html", [figure.drawing()], seconds, figure=figure)


def write_report(run: RunFile) -> Path:
    """Write report.html beside the run.json of a run, whole or not at all, and return its path."""
    path = run.folder / FILE
    write_file(path, report_html(run))
    return path
