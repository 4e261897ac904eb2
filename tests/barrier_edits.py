"""What tests do to a kernel's protocol to see whether the model can tell: steps of a kind left out or moved."""

from __future__ import annotations

import re
from collections.abc import Sequence

from tests.barrier_steps import Arrive, BarArrive, BarWait, Fence, MmaWait, Step, Wait
from tests.decode_pages import Scale
from tests.decode_protocol import Consumers, Edit, protocol


def kind(steps: Sequence[Step], at: int) -> str:
    """What a step does for synchronisation, stages and pairs of tiles aside; "" if nothing."""
    match steps[at]:
        case Wait(barrier=barrier) | Arrive(barrier=barrier) as step:
            return f"{type(step).__name__} {re.sub(r'[0-9]*_[0-9]+$', '', barrier)}"
        case BarArrive(barrier, label):
            return f"Sync {barrier} for {label.split()[0]}"
        case BarWait():
            return kind(steps, at - 1)
        case Fence(label) | MmaWait(label) as step:
            return f"{type(step).__name__} {label.split()[0]}"
    return ""


def kinds(consumers: Consumers, *types: type) -> list[tuple[str, str]]:
    """Every role and kind of these types that the kernel's protocol has."""
    found: dict[tuple[str, str], None] = {}

    def note(role: str, steps: list[Step]) -> list[Step]:
        found.update({(role, kind(steps, at)): None for at, step in enumerate(steps) if isinstance(step, types)})
        return steps

    protocol(("3p", "2"), Scale(warps=1, pairs=1), note, consumers=consumers)
    return list(found)


def without(role: str, left_out: str) -> Edit:
    def edit(name: str, steps: list[Step]) -> list[Step]:
        return [step for at, step in enumerate(steps) if name != role or kind(steps, at) != left_out]

    return edit


def moved(role: str, what: str, past: tuple[type, ...], by: int) -> Edit:
    """Every step of that kind goes up (by -1) or down (by 1), past its neighbours of these types and one step more."""

    def edit(name: str, steps: list[Step]) -> list[Step]:
        if name != role:
            return steps
        chosen = [step for at, step in enumerate(steps) if kind(steps, at) == what and not isinstance(step, BarWait)]
        result = list(steps)
        for step in chosen[::-by]:  # so that none meets another one
            at = next(at for at, other in enumerate(result) if other is step)
            to = at + by
            while 0 < to < len(result) - 1 and isinstance(result[to], past):
                to += by
            result.insert(to, result.pop(at))
        return result

    return edit


def systematic(consumers: Consumers, *roles: str) -> dict[str, Edit]:
    """By name: every step of these roles, or of all, left out, every arrival a step early, every wait a step late."""

    def chosen(*types: type) -> list[tuple[str, str]]:
        return [(role, what) for role, what in kinds(consumers, *types) if not roles or role in roles]

    return {
        **{
            f"{role} without {what}": without(role, what)
            for role, what in chosen(Wait, Arrive, BarArrive, MmaWait, Fence)
        },
        **{
            f"{role}, early {what}": moved(role, what, (Arrive, BarArrive), -1)
            for role, what in chosen(Arrive, BarArrive)
        },
        **{f"{role}, late {what}": moved(role, what, (Wait, BarWait), 1) for role, what in chosen(Wait)},
    }
