"""The barrier protocol of kernels/sm90/few_rows/decode.cuh, in every order its warps can run in."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from functools import partial
from itertools import product

import pytest

from tests.barrier_edits import kind, systematic
from tests.barrier_machine import Violation, explore, sample
from tests.barrier_steps import Load, Step, Store
from tests.decode_pages import Scale
from tests.decode_protocol import Consumers, Edit, protocol
from tests.few_rows_roles import FEW_ROWS, run_left, run_right

few_rows = partial(protocol, consumers=FEW_ROWS)
WALKS = 100  # where there are more orders than can be run


def few_rows_consumers(whole: Collection[int]) -> Consumers:
    return replace(FEW_ROWS, run_left=partial(run_left, whole=whole), run_right=partial(run_right, whole=whole))


# --- The protocol holds.

# Stages and parities of both rings repeat after 12 pages.
WORK_LISTS = {
    "one item": [(size,) for size in ("0", "1", "1p", "2", "2p", "3", "3p", "5", "5p", "13")],
    "two items": list(product(("1p", "2", "3p"), repeat=2)),
    "three items": list(product(("0", "1", "2p"), repeat=3)),
}


@pytest.mark.parametrize("lists", WORK_LISTS.values(), ids=WORK_LISTS)
def test_no_order_of_execution_breaks_the_protocol(lists: Sequence[tuple[str, ...]]) -> None:
    """Each warpgroup as one warp, and each half of a page as one copy."""
    for work in lists:
        explore(few_rows(work, Scale(warps=1, pairs=1)))


@pytest.mark.parametrize("work", [("1p",), ("3p",)])
def test_warps_of_a_group_may_drift_apart(work: tuple[str, ...]) -> None:
    assert explore(few_rows(work, Scale(warps=2, pairs=1))) > 900


@pytest.mark.parametrize("work", [("3p",), ("1p", "0", "1")])
def test_tiles_of_a_page_may_arrive_out_of_turn(work: tuple[str, ...]) -> None:
    assert explore(few_rows(work, Scale(warps=1, pairs=2))) > 1000


@pytest.mark.parametrize("whole", [(), (0,), (1,), (2,), (0, 1, 2, 3, 4)])
@pytest.mark.parametrize("work", [("1", "1p", "1", "1"), ("2", "1", "0", "1p", "3")])
def test_items_may_be_cut_or_whole(work: tuple[str, ...], whole: Collection[int]) -> None:
    """At the end of a whole one warps of a side do not meet."""
    sample(protocol(work, Scale(warps=2, pairs=2), consumers=few_rows_consumers(whole)), WALKS)


# --- And the model can tell. First, step by step: nothing may be left out, no arrival come early, no wait late.

# Quick for most; enough for warps to drift apart; enough for every ring to wrap and for an item to follow another.
PROBLEMS = (
    (("2p",), Scale(warps=1, pairs=1)),
    (("2p",), Scale(warps=2, pairs=1)),
    (("3p", "1p"), Scale(warps=1, pairs=1)),
)

SYSTEMATIC = systematic(FEW_ROWS, "left", "right")

# And why: the left side fences P right after it has zeroed a tail.
HARMLESS = {"left without Fence zero"}


@pytest.mark.parametrize("name", SYSTEMATIC)
def test_every_step_is_needed_where_it_is(name: str) -> None:
    if name in HARMLESS:
        for work, scale in PROBLEMS:
            explore(few_rows(work, scale, SYSTEMATIC[name]))
        return
    with pytest.raises(Violation):
        for work, scale in PROBLEMS:
            explore(few_rows(work, scale, SYSTEMATIC[name]))


# --- Then what a change to the kernel might get wrong.


def one_right_largest(name: str, steps: list[Step]) -> list[Step]:
    def first(region: str) -> str:
        return region.replace("right_largest_1", "right_largest_0")

    result: list[Step] = []
    for step in steps:
        match step:
            case Store(regions, label):
                result.append(Store(tuple(map(first, regions)), label))
            case Load(region=region):
                result.append(step._replace(region=first(region)))
            case _:
                result.append(step)
    return result


def late_sums(waits: bool) -> Edit:
    """The right side reads sums when it has released the page, and `waits` for them only then."""

    def edit(name: str, steps: list[Step]) -> list[Step]:
        result: list[Step] = []
        late: list[Step] = []
        for at, step in enumerate(steps):
            loads = isinstance(step, Load) and step.region.startswith("sum_")
            if name == "right" and (loads or (waits and kind(steps, at) == "Wait sum_full")):
                late.append(step)
            else:
                result.append(step)
            if kind(steps, at) == "Arrive right_empty":
                result += late
                late = []
        return result

    return edit


@pytest.mark.parametrize(
    ("waits", "message"),
    [
        (False, "right.*load expects p 0 in sum_0.*, which holds p 2"),
        (True, "right.* may still wait for .* sum_full_0"),
    ],
)
def test_sums_are_read_before_the_page_is_released(waits: bool, message: str) -> None:
    with pytest.raises(Violation, match=message):
        explore(few_rows(("1", "1", "1"), Scale(warps=1, pairs=1), late_sums(waits)))


@pytest.mark.parametrize("whole", [(), (1,)], ids=["one buffer", "a buffer that changes at whole items, too"])
def test_the_right_side_needs_two_buffers_for_its_largest_values(whole: Collection[int]) -> None:
    """The next item that is cut may end before all warps have read this one's; the left side meets at every p_full."""
    made = protocol(("1", "1", "1"), Scale(warps=2, pairs=1), one_right_largest, consumers=few_rows_consumers(whole))
    with pytest.raises(Violation, match=r"right.*(load expects largest|store of largest .* a load of right)"):
        sample(made, WALKS)
