"""The claims made for batch normalization, each with its design, its measurement and its verdict."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from batchnorm.errors import InputError
from batchnorm.lab.claims import (
    fewer_steps,
    initial_weights,
    inputs,
    placement,
    regularisation,
    shift,
    stability,
)
from batchnorm.lab.claims.claim import Claim
from batchnorm.lab.claims.judgement import judge, power, sentence
from batchnorm.lab.claims.study import Study

__all__ = ["CLAIMS", "Claim", "Study", "claims_named", "judge_claims"]

CLAIMS: dict[str, Claim] = {
    module.CLAIM.name: module.CLAIM
    for module in (fewer_steps, stability, initial_weights, regularisation, inputs, placement, shift)
}


def claims_named(names: Sequence[str]) -> list[Claim]:
    """The claims of some names, in the order of the study and each once."""
    unknown = [name for name in names if name not in CLAIMS]
    if unknown:
        raise InputError(f"a claim must be one of {', '.join(CLAIMS)}; got {unknown[0]!r}")
    return [claim for name, claim in CLAIMS.items() if name in names]


def judge_claims(study: Study, claims: Sequence[Claim]) -> dict[str, Any]:
    """``claims`` and ``power`` of a result: every claim measured, all of them judged together."""
    measured = [claim.measure(study) for claim in claims]
    findings = judge([measurement for one in measured for measurement in one.measurements])
    judged = []
    for claim, one in zip(claims, measured, strict=True):
        own, findings = findings[: len(one.measurements)], findings[len(one.measurements) :]
        judged.append(
            {
                "name": claim.name,
                "title": claim.title,
                "question": claim.question,
                "design": claim.design(study),
                "sentence": sentence(claim.statement, own),
                "findings": own,
                "details": one.details,
            }
        )
    tests = sum(m.judged and m.family == "steps" for one in measured for m in one.measurements)
    return {"claims": judged, "power": power(study.settings.seeds, max(tests, 1))}
