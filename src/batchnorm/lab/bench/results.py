"""Results of the benchmark: a run, its cases, their times."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from batchnorm.lab.bench.registry import AnyCase, Case
from batchnorm.lab.bench.request import BenchKind, BenchSettings
from batchnorm.lab.bench.timing import Quartiles
from batchnorm.lab.machine import Machine

__all__ = ["BenchRun", "CaseResult", "Copies", "KernelTiming", "ModelTiming", "Share", "TimedCase", "Timing"]


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Times of the sides of a case, which were timed in turn.

    Attributes
    ----------
    rounds : int
        Number of samples per side.
    microseconds : dict of Quartiles
        Microseconds per call of each side: "ours", "torch", and the others that were timed.
    speedup : Quartiles
        Ratio of torch's time to ours, per round.
    speedup_over_compiled, speedup_over_untuned : Quartiles or None
        Ratio of the time of torch.compile, and of torch with the allocator as it is, to our time.
    processor_share : float or None
        Share of the time in which the timing threads had a processor; on an idle machine it is near 1. None in results
        of earlier versions.
    """

    rounds: int
    microseconds: dict[str, Quartiles]
    speedup: Quartiles
    speedup_over_compiled: Quartiles | None = None
    speedup_over_untuned: Quartiles | None = None
    processor_share: float | None = None


@dataclass(frozen=True)
class Copies:
    """Time in copies of x: ours, torch's, and the floor that memory traffic sets."""

    ours: float
    torch: float
    floor: float


@dataclass(frozen=True, kw_only=True)
class KernelTiming(Timing):
    """Timing of a batch normalization, also in copies of x and as memory traffic."""

    copies: Copies
    gigabytes_per_second: float


@dataclass(frozen=True)
class Share:
    """Share of a training step that batch norm, activations and additions take, with torch's layers and with ours."""

    torch: float
    ours: float


@dataclass(frozen=True, kw_only=True)
class ModelTiming(Timing):
    """Timing of a training step, and the share of batch norm in it."""

    share: Share


@dataclass(frozen=True)
class CaseResult:
    """A case, and either its timing or the fault of our result, in which case it is not timed."""

    case: AnyCase
    timing: Timing | None = None
    fault: str | None = None


class TimedCase(NamedTuple):
    """A batch normalization and its timing."""

    case: Case
    timing: KernelTiming


@dataclass
class BenchRun:
    """A run of ``batchnorm bench``; results are added as they are measured."""

    kind: BenchKind
    command: str
    settings: BenchSettings
    machine: Machine
    results: list[CaseResult] = field(default_factory=list)
    complete: bool = False

    @property
    def faults(self) -> list[CaseResult]:
        """The results that are wrong, and so were not timed."""
        return [result for result in self.results if result.fault is not None]

    def timed(self) -> Iterator[tuple[AnyCase, Timing]]:
        """Iterate over the cases that were timed."""
        return ((result.case, result.timing) for result in self.results if result.timing is not None)

    def timed_kernels(self) -> list[TimedCase]:
        """Return the batch normalizations that were timed; empty in a run of another kind."""
        return [
            TimedCase(case, timing)
            for case, timing in self.timed()
            if isinstance(case, Case) and isinstance(timing, KernelTiming)
        ]
