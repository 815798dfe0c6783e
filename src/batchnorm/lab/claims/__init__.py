"""The claims about batch normalization, each with its design, its measurements and its verdict."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from batchnorm.errors import InputError
from batchnorm.lab.claims import (
    fewer_steps,
    initial_weights,
    inputs,
    placement,
    regularization,
    shift,
    stability,
)
from batchnorm.lab.claims.claim import Claim, JudgedClaim
from batchnorm.lab.claims.judgment import Power, judge, power, sentence
from batchnorm.lab.comparison.run_file import RunFile
from batchnorm.lab.comparison.study import Study
from batchnorm.lab.json_records import from_json
from batchnorm.lab.training.records import RecordName
from batchnorm.lab.training.stacks import Stack

__all__ = ["CLAIMS", "Claim", "ClaimTests", "Judgment", "read_judgment"]

CLAIMS: dict[str, Claim] = {
    module.CLAIM.name: module.CLAIM
    for module in (fewer_steps, stability, initial_weights, regularization, inputs, placement, shift)
}


@dataclass(frozen=True)
class Judgment:
    """The claims that a comparison judged, and how much its number of seeds can show."""

    claims: list[JudgedClaim]
    power: Power


class ClaimTests:
    """Claims that a comparison measures and judges (an `Extension` of it).

    Parameters
    ----------
    names : sequence of str
        Names of `CLAIMS`; they are measured in the order of `CLAIMS`, each once.
    """

    def __init__(self, names: Sequence[str]) -> None:
        unknown = [name for name in names if name not in CLAIMS]
        if unknown:
            raise InputError(f"claims must be some of {', '.join(CLAIMS)}; got {unknown[0]!r}")
        self.claims = [claim for name, claim in CLAIMS.items() if name in names]

    @property
    def names(self) -> list[str]:
        """The names of the claims."""
        return [claim.name for claim in self.claims]

    @property
    def records(self) -> tuple[RecordName, ...]:
        """The recorders that the confirming runs need."""
        return tuple(dict.fromkeys(record for claim in self.claims for record in claim.records))

    def stacks(self, study: Study) -> list[Stack]:
        """Return the stacks that the claims train besides the comparison."""
        return [stack for claim in self.claims for stack in claim.stacks(study)]

    def judge(self, study: Study) -> Judgment:
        """Return every claim measured, all of them judged together."""
        measured = [claim.measure(study) for claim in self.claims]
        findings = judge([measurement for one in measured for measurement in one.measurements])
        judged = []
        for claim, one in zip(self.claims, measured, strict=True):
            own, findings = findings[: len(one.measurements)], findings[len(one.measurements) :]
            judged.append(
                JudgedClaim(
                    name=claim.name,
                    title=claim.title,
                    question=claim.question,
                    design=claim.design(study),
                    sentence=sentence(claim.statement, own),
                    findings=own,
                    details=one.details,
                )
            )
        tests = sum(m.judged and m.effect.family == "steps" for one in measured for m in one.measurements)
        return Judgment(judged, power(study.settings.seeds, max(tests, 1)))


def read_judgment(run: RunFile) -> Judgment | None:
    """Return the judged claims of a run; None where it has none."""
    if "claims" not in run.extension:
        return None
    claims = []
    for values in run.extension["claims"]:
        details = values["details"] and from_json(CLAIMS[values["name"]].details, values["details"])
        claims.append(from_json(JudgedClaim, values | {"details": details}))
    return Judgment(claims, from_json(Power, run.extension["power"]))
