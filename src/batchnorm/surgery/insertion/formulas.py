"""Nonlinearities as networks write them: one step or a formula of several, as SiLU, and the gates of other tensors."""

from __future__ import annotations

from collections import deque

from batchnorm.surgery.graph import Dataflow, Step, Unknown
from batchnorm.surgery.insertion.step_kinds import Kind, is_bounded, is_constant, kind_of, operands

__all__ = ["combines_others", "end_of_formula", "is_gate"]

ELEMENTWISE = {Kind.NONLINEARITY, Kind.ARITHMETIC, Kind.ADDS, Kind.MULTIPLIES}


def combines_others(flow: Dataflow, step: Step) -> bool:
    """Return whether a step of arithmetic takes values from several places, as the sum of a residual branch does."""
    varying = [operand for operand in operands(flow, step) if not is_constant(flow, operand)]
    return len(varying) > 1 and len(_leaves(flow, step)) > 1


def end_of_formula(flow: Dataflow, nonlinearity: Step) -> Step:
    """Return the last step of the formula that a nonlinearity is part of: the product in ``x * sigmoid(x)``."""
    base, end = _leaves(flow, nonlinearity), nonlinearity
    waiting, seen = deque([nonlinearity]), {nonlinearity}
    while waiting:
        for use in flow.uses(waiting.popleft()):
            if isinstance(use, Unknown) or use in seen or kind_of(flow, use) not in ELEMENTWISE:
                continue
            seen.add(use)
            if _leaves(flow, use) <= base:
                waiting.append(use)
                varying = [operand for operand in operands(flow, use) if not is_constant(flow, operand)]
                end = use if len(varying) > 1 else end
    while end != nonlinearity and (scaled := _scaled(flow, end)) is not None:
        end = scaled
    return end


def _scaled(flow: Dataflow, step: Step) -> Step | None:
    """Return the step that takes a value and numbers alone, as the division in ``x * relu6(x + 3) / 6``, if it does."""
    uses = flow.uses(step)
    if len(uses) != 1 or isinstance(uses[0], Unknown) or kind_of(flow, uses[0]) not in (Kind.ADDS, Kind.MULTIPLIES):
        return None
    return uses[0] if len(uses[0].node.all_input_nodes) == 1 else None


def is_gate(flow: Dataflow, nonlinearity: Step) -> bool:
    """Return whether a nonlinearity's output multiplies another tensor, which is no gate itself."""
    waiting, seen = deque([nonlinearity]), {nonlinearity}
    while waiting:
        value = waiting.popleft()
        for use in flow.uses(value):
            if isinstance(use, Unknown) or use in seen:
                continue
            seen.add(use)
            kind = kind_of(flow, use)
            if kind is Kind.MULTIPLIES and _gates(flow, nonlinearity, value, use):
                return True
            if kind in (Kind.PASSES, Kind.MULTIPLIES, Kind.ARITHMETIC) or (
                kind is Kind.ADDS and not combines_others(flow, use)
            ):
                waiting.append(use)
    return False


def _gates(flow: Dataflow, nonlinearity: Step, value: Step, product: Step) -> bool:
    """Return whether a value that comes from a nonlinearity is the gate of the other tensor in a product."""
    base = _leaves(flow, nonlinearity)
    others = [operand for operand in operands(flow, product) if operand != value]
    others = [other for other in others if not is_constant(flow, other) and not _leaves(flow, other) <= base]
    if not others or is_bounded(flow, nonlinearity):
        return bool(others)
    return not any(_comes_from_gate(flow, other) for other in others)


def _comes_from_gate(flow: Dataflow, value: Step | Unknown) -> bool:
    waiting, seen = deque([value]), {value}
    while waiting:
        step = waiting.popleft()
        if isinstance(step, Unknown):
            continue
        if is_bounded(flow, step):
            return True
        if kind_of(flow, step) in (Kind.PASSES, Kind.ARITHMETIC, Kind.ADDS, Kind.MULTIPLIES):
            new = [source for source in operands(flow, step) if source not in seen]
            waiting.extend(new)
            seen.update(new)
    return False


def _leaves(flow: Dataflow, value: Step | Unknown) -> set[Step | Unknown]:
    """Return the values of which a value is computed elementwise, besides constants."""
    found: set[Step | Unknown] = set()
    waiting, seen = [value], {value}
    while waiting:
        step = waiting.pop()
        if isinstance(step, Unknown) or kind_of(flow, step) not in ELEMENTWISE:
            if not is_constant(flow, step):
                found.add(step)
            continue
        new = [operand for operand in operands(flow, step) if operand not in seen]
        waiting.extend(new)
        seen.update(new)
    return found
