"""The barrier protocol of kernels/sm90/decode.cuh, in every order its warps can run in."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import product

import pytest

from tests.barrier_machine import Arrive, BarArrive, BarWait, Load, MmaWait, Step, Violation, Wait, explore
from tests.decode_protocol import Edit, Scale, protocol

# --- The protocol holds.

SIZES = ("0", "1", "1p", "2", "2p", "3", "3p")
WORK_LISTS = [*product(SIZES, repeat=1), *product(SIZES, repeat=2), *product(("0", "1p", "2"), repeat=3)]


def test_no_order_of_execution_breaks_the_protocol() -> None:
    """Each warpgroup as one warp, over many lists of items."""
    for work in WORK_LISTS:
        explore(protocol(work, Scale(warps=1, groups=1)))


@pytest.mark.parametrize("work", [("3p",), ("2", "1p"), ("1p", "0", "1")])
def test_warps_of_a_group_may_drift_apart(work: tuple[str, ...]) -> None:
    assert explore(protocol(work, Scale(warps=2, groups=1))) > 1000


@pytest.mark.parametrize("work", [("3p", "2"), ("2", "1p", "2"), ("1p", "0", "3")])
def test_tiles_of_a_page_may_arrive_out_of_turn(work: tuple[str, ...]) -> None:
    assert explore(protocol(work, Scale(warps=1, groups=2))) > 1000


# --- And the model can tell: each of these edits breaks it.


def edited(role: str, change: Callable[[Step], Sequence[Step]]) -> Edit:
    """Replace each step of one role by what `change` makes of it."""
    return lambda name, steps: [new for step in steps for new in change(step)] if name == role else steps


def without(role: str, kind: type, barrier: str) -> Edit:
    return edited(
        role, lambda step: [] if isinstance(step, kind) and getattr(step, "barrier", "").startswith(barrier) else [step]
    )


def one_p_ready_barrier(role: str, steps: list[Step]) -> list[Step]:
    def change(step: Step) -> list[Step]:
        if isinstance(step, (BarArrive, BarWait)) and step.barrier == "p_ready_1":
            return [step._replace(barrier="p_ready_0")]
        return [step]

    return edited(role, change)(role, steps)


def arrive_before_mma_wait(role: str, barrier: str) -> Edit:
    """`barrier` is arrived at before the MMAs that it stands for have completed."""

    def earlier(name: str, steps: list[Step]) -> list[Step]:
        result: list[Step] = []
        for step in steps:
            early = name == role and isinstance(step, Arrive) and step.barrier.startswith(barrier)
            result.insert(len(result) - early, step)
        return result

    return earlier


def factors_after_release(name: str, steps: list[Step]) -> list[Step]:
    if name != "right":
        return steps
    result: list[Step] = []
    late: list[Step] = []
    for step in steps:
        if isinstance(step, Load):
            late.append(step)
            continue
        result.append(step)
        if isinstance(step, Arrive):
            result += late
            late.clear()
    return result


def no_wait_for_zeros(name: str, steps: list[Step]) -> list[Step]:
    def after_zeros(index: int) -> bool:
        return any(
            isinstance(s, BarArrive) and s.barrier == "left_group" and s.label[0] == "zero"
            for s in steps[index - 1 : index + 1]
        )

    return [step for index, step in enumerate(steps) if name != "left" or not after_zeros(index)]


def also_wait_for_left_groups(step: Step) -> list[Step]:
    if isinstance(step, Wait) and step.barrier.startswith("kv_full"):
        return [step._replace(barrier=f"kv_full0_{step.barrier[-1]}"), step]
    return [step]


def never_flip_parity(step: Step) -> list[Step]:
    return [step._replace(parity=0) if isinstance(step, Wait) else step]


MUTANTS: dict[str, tuple[Edit, str]] = {
    "one P-ready barrier for both stages": (one_p_ready_barrier, "arrives at p_ready_0"),
    "the left side does not say that P is ready": (without("left", BarArrive, "p_ready"), "deadlock"),
    "the right side does not wait for P": (without("right", BarWait, "p_ready"), "expects"),
    "the right side waits for groups that the left side frees": (
        edited("right", also_wait_for_left_groups),
        "may still wait for phase|waits for phase",
    ),
    "the right side reads the factors after its release": (factors_after_release, "right.*load expects"),
    "a parity that never flips": (edited("right", never_flip_parity), "stands for another phase"),
    "the left side's tiles are released during P V": (
        arrive_before_mma_wait("left", "left_empty"),
        "MMA of left is reading",
    ),
    "the right side's tiles are released during P V": (
        arrive_before_mma_wait("right", "right_empty"),
        "MMA of right is reading",
    ),
    "Q is released during S": (arrive_before_mma_wait("left", "q_empty"), "store of .'q'.* MMA of left is reading"),
    "P overwrites K during S": (
        edited("left", lambda step: [] if step == MmaWait(0) else [step]),
        "store of .'p'.* MMA of left is reading",
    ),
    "Q is loaded without waiting": (without("queries", Wait, "q_empty"), "arrives at q_full_0"),
    "pages are loaded without waiting for the left side": (without("pages", Wait, "left_empty"), "copy of"),
    "pages are loaded without waiting for the right side": (without("pages", Wait, "right_empty"), "copy of"),
    "left reads V before the other warps have zeroed it": (no_wait_for_zeros, "expects .'zero'"),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_a_broken_protocol_is_caught(name: str) -> None:
    edit, message = MUTANTS[name]
    with pytest.raises(Violation, match=message):
        explore(protocol(("3p", "2"), Scale(warps=2, groups=1), edit=edit))
