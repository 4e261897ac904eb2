"""The barrier protocol of kernels/sm90/decode.cuh, in every order its warps can run in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import product

import pytest

from tests.barrier_edits import kind, systematic
from tests.barrier_machine import Violation, explore, sample
from tests.barrier_steps import Arrive, Copy, Load, Step, Wait
from tests.decode_pages import Scale
from tests.decode_protocol import DECODE, Edit, protocol

# --- The protocol holds.

# Stages and parities of both rings repeat after 12 pages.
WORK_LISTS = {
    "one item": [(size,) for size in ("0", "1", "1p", "2", "2p", "3", "3p", "5", "5p", "13")],
    "two items": list(product(("1p", "2", "3p", "5"), repeat=2)),
    "three items": list(product(("0", "1", "2p"), repeat=3)),
    "leaves": [("1+1",), ("1+1+1+1p",), ("2+3", "3+2p"), ("1+2p", "0", "2+1"), ("4+5", "1")],
}


@pytest.mark.parametrize("lists", WORK_LISTS.values(), ids=WORK_LISTS)
def test_no_order_of_execution_breaks_the_protocol(lists: Sequence[tuple[str, ...]]) -> None:
    """Each warpgroup as one warp, and each half of a page as one copy."""
    for work in lists:
        explore(protocol(work, Scale(warps=1, pairs=1)))


@pytest.mark.parametrize("work", [("3p",), ("2", "1p"), ("1p", "0", "1")])
def test_warps_of_a_group_may_drift_apart(work: tuple[str, ...]) -> None:
    assert explore(protocol(work, Scale(warps=2, pairs=1))) > 1000


@pytest.mark.parametrize("work", [("3p",), ("2", "1p"), ("1p", "0", "1")])
def test_tiles_of_a_page_may_arrive_out_of_turn(work: tuple[str, ...]) -> None:
    assert explore(protocol(work, Scale(warps=1, pairs=2))) > 1000


# --- And the model can tell. First, step by step: nothing may be left out, no arrival come early, no wait late.

# Enough for every ring to wrap and for an item to follow another; enough for warps to drift apart.
PROBLEMS = ((("3p", "1p"), Scale(warps=1, pairs=1)), (("2p",), Scale(warps=2, pairs=1)))


SYSTEMATIC = systematic(DECODE)

# And why: the hold only lets Q and the first page be fetched before the second page, the wait for the page before only
# leaves memory to what is needed first; scores_issued only keeps P V off the tensor cores until they have nothing
# better to do; and who fills the slot of P next waits for more than p_full.
HARMLESS = {
    *(
        f"stream_{side}{change} Wait {barrier}"
        for side in ("left", "right")
        for barrier in ("q_full", f"{side}_full")
        for change in (" without", ", late")
    ),
    *(f"right{change} Wait scores_issued" for change in (" without", ", late")),
    "left, early Arrive scores_issued",
    "left, early Arrive p_full",
}


@pytest.mark.parametrize("name", SYSTEMATIC)
def test_every_step_is_needed_where_it_is(name: str) -> None:
    if name in HARMLESS:
        for work, scale in PROBLEMS:
            explore(protocol(work, scale, SYSTEMATIC[name]))
        return
    with pytest.raises(Violation):
        for work, scale in PROBLEMS:
            explore(protocol(work, scale, SYSTEMATIC[name]))


# --- Then what a change to the kernel might get wrong.


def hold_for_a_single_page(name: str, steps: list[Step]) -> list[Step]:
    if not name.startswith("stream"):
        return steps
    first_page = max(at for at, step in enumerate(steps) if isinstance(step, Copy) and step.label == "k 0")
    return [*steps[: first_page + 1], Wait("q_full1_0", parity=0, round=0), *steps[first_page + 1 :]]


def read_factors(before: str = "", after: str = "") -> Edit:
    """The right side reads the factors of O just before or after another step of the page."""

    def edit(name: str, steps: list[Step]) -> list[Step]:
        if name != "right":
            return steps
        result: list[Step] = []
        begin = 0
        for end in (at + 1 for at in range(len(steps)) if kind(steps, at) == "Arrive right_empty"):
            page = steps[begin:end]
            loads = [step for step in page if isinstance(step, Load) and not step.region.startswith("rope")]
            for at, step in enumerate(page):
                result += loads if kind(page, at) == before else []
                result += [] if step in loads else [step]
                result += loads if kind(page, at) == after else []
            begin = end
        return result

    return edit


def parity_that_never_flips(role: str) -> Edit:
    def edit(name: str, steps: list[Step]) -> list[Step]:
        first = {step.barrier: step.parity for step in reversed(steps) if isinstance(step, Wait)}
        return [
            step._replace(parity=first[step.barrier]) if name == role and isinstance(step, Wait) else step
            for step in steps
        ]

    return edit


def one_p_full_for_both_slots(name: str, steps: list[Step]) -> list[Step]:
    return [
        step._replace(barrier="p_full_0") if isinstance(step, (Arrive, Wait)) and step.barrier == "p_full_1" else step
        for step in steps
    ]


@pytest.mark.parametrize(
    ("work", "edit", "message"),
    [
        (("1", "1"), hold_for_a_single_page, "stream_.* may still wait for phase 0 of q_full1_0"),
        (("2",), read_factors(before="Wait p_full"), "right.*load expects p 1 in rescale_1"),
        (
            ("3", "1"),
            read_factors(after="Arrive rope_empty"),
            "store of p . overwrites .*(rescale|inverse_sum).* a load of right",
        ),
        (("3",), one_p_full_for_both_slots, "right.* may still wait for phase 0 of p_full_0"),
        (("5",), parity_that_never_flips("stream_left"), "stands for another phase"),
        (("5",), parity_that_never_flips("stream_right"), "stands for another phase"),
        (("1", "1", "1"), parity_that_never_flips("queries"), "stands for another phase"),
        (("5",), parity_that_never_flips("left"), "stands for another phase"),
        (("5",), parity_that_never_flips("right"), "stands for another phase"),
    ],
)
def test_a_wrong_change_is_caught(work: tuple[str, ...], edit: Edit, message: str) -> None:
    with pytest.raises(Violation, match=message):
        explore(protocol(work, Scale(warps=1, pairs=1), edit))


ONE = Scale(warps=1, pairs=1)


def test_two_right_stages_would_do() -> None:
    """The third one is there to load ahead; P V of a page is through before the page after next."""
    explore(protocol(("5", "3p"), replace(ONE, right_stages=2)))


def test_one_right_stage_would_not() -> None:
    """S of the second page waits for its right half, which waits for P V of the first, which comes after that S."""
    with pytest.raises(Violation, match="deadlock"):
        explore(protocol(("2",), replace(ONE, right_stages=1)))


@pytest.mark.parametrize(
    ("role", "ring"),
    [
        *product(("stream_left", "right"), [replace(ONE, left_stages=1)]),
        *product(("stream_right", "left", "right"), [replace(ONE, right_stages=2)]),
    ],
)
def test_a_ring_of_another_size_in_one_role_is_caught(role: str, ring: Scale) -> None:
    with pytest.raises(Violation):
        explore(protocol(("5",), ONE, scale_of={role: ring}))


# --- Two blocks in a cluster: more orders than can be run, so some.

PAIR = Scale(warps=1, pairs=1, blocks=2)
WALKS = 200


@pytest.mark.parametrize("scale", [PAIR, Scale(warps=2, pairs=2, blocks=2)], ids=["one warp", "two warps"])
@pytest.mark.parametrize("work", [("1",), ("2", "1p"), ("5p", "2", "1", "0", "3p"), ("13",), ("2+3", "0", "3+2p")])
def test_a_cluster_keeps_the_protocol(work: tuple[str, ...], scale: Scale) -> None:
    sample(protocol(work, scale), WALKS)


# Who may expect a page only after its waits could as well before: the page that was in that slot has arrived, and S has
# read the last rope columns.
HARMLESS_IN_A_CLUSTER = {
    *HARMLESS,
    "stream_left, late Wait rope_empty",
    *(f"stream_{side}, late Wait {side}_empty" for side in ("left", "right")),
}


@pytest.mark.parametrize("name", [name for name in SYSTEMATIC if name not in HARMLESS_IN_A_CLUSTER])
def test_every_step_is_needed_in_a_cluster(name: str) -> None:
    with pytest.raises(Violation):
        for work, scale in PROBLEMS:
            sample(protocol(work, replace(scale, blocks=2), SYSTEMATIC[name]), WALKS)


def ends_without_waiting(name: str, steps: list[Step]) -> list[Step]:
    """The producer is gone after its last load."""
    if not name.startswith("stream"):
        return steps
    return steps[: max(at for at, step in enumerate(steps) if isinstance(step, (Copy, Arrive))) + 1]


def test_a_block_must_not_end_before_the_other_has_released_its_slots() -> None:
    with pytest.raises(Violation, match=r"arrives at .*_empty.*, and the thread block that it lies in has ended"):
        sample(protocol(("2", "1"), PAIR, ends_without_waiting), WALKS)


def test_a_slot_is_not_free_when_its_own_block_has_read_it() -> None:
    """Releases that do not reach the other block, which loads into both."""
    made = protocol(("3",), PAIR)

    def own_block_only(name: str, steps: Sequence[Step]) -> list[Step]:
        own = name[-2:]
        return [
            step
            for step in steps
            if not (isinstance(step, Arrive) and "_empty" in step.barrier and not step.barrier.endswith(own))
        ]

    halved = {barrier: count // 2 if "t_empty" in barrier else count for barrier, count in made.mbarriers.items()}
    programs = {name: own_block_only(name, steps) for name, steps in made.programs.items()}
    with pytest.raises(Violation, match=r"copy of k . overwrites|deadlock"):
        sample(replace(made, programs=programs, mbarriers=halved), WALKS)


def test_rope_columns_that_one_block_loads_for_both_are_released_at_that_block_alone() -> None:
    """At the other one nobody would wait before the next release comes."""
    made = protocol(("5",), PAIR)

    def released_at_both(steps: Sequence[Step]) -> list[Step]:
        result: list[Step] = []
        for step in steps:
            result.append(step)
            if isinstance(step, Arrive) and step.barrier.startswith("rope_empty"):
                other = {"0": "1", "1": "0"}[step.barrier[-1]]
                result.append(step._replace(barrier=step.barrier[:-1] + other))
        return result

    programs = {name: released_at_both(steps) for name, steps in made.programs.items()}
    with pytest.raises(Violation, match=r"arrives at rope_empty.* while the round for .* is open"):
        sample(replace(made, programs=programs), WALKS)
