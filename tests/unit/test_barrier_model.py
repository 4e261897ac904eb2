"""The barrier protocol of kernels/sm90/decode.cuh, in every order its warps can run in.

Each role below is the kernel's function of that name with everything but synchronisation and shared memory left out.
Two warps stand for a warpgroup's four (and for the three that load Q): enough for warps that drift apart.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product

import pytest

from tests.barrier_machine import (
    Arrive,
    BarArrive,
    BarWait,
    Copy,
    Label,
    Load,
    Mma,
    MmaWait,
    Protocol,
    Reads,
    Step,
    Store,
    Violation,
    Wait,
    explore,
)

STAGES = 2
HALVES = ("low", "high")  # the latent columns of O's two warpgroups; the rope columns come with the high ones


@dataclass
class Ring:
    """As in the kernel, and beside the parity the phase it is meant to stand for."""

    stages: int = STAGES
    stage: int = 0
    parity: int = 0
    round: int = 0

    def advance(self) -> None:
        self.stage = (self.stage + 1) % self.stages
        if self.stage == 0:
            self.parity ^= 1
            self.round += 1

    def full(self, barrier: str) -> Wait:
        return Wait(f"{barrier}{self.stage}", self.parity, self.round)

    def empty(self, barrier: str) -> Wait:
        return Wait(f"{barrier}{self.stage}", self.parity ^ 1, self.round - 1)


@dataclass(frozen=True)
class Page:
    serial: int
    partial: bool  # it has rows past the length, which must be zeroed before they are read as V
    first: bool
    last: bool


Item = tuple[Page, ...]


def make_items(work: Sequence[str]) -> list[Item]:
    """ "2" is an item of two pages, "2p" the same with a partial last page."""
    items, serial = [], 0
    for text in work:
        count = int(text.rstrip("p"))
        items.append(
            tuple(Page(serial + i, text.endswith("p") and i + 1 == count, i == 0, i + 1 == count) for i in range(count))
        )
        serial += count
    return items


# --- Shared memory: what a page's data is called while it is K, zero-filled V, or P.


def k(page: Page) -> Label:
    return ("k", page.serial)


def p(page: Page) -> Label:
    return ("p", page.serial)


def factors(page: Page) -> Label:
    return ("factors", page.serial)


def tails(stage: int, half: str, warps: int) -> tuple[str, ...]:
    """Rows past the length of a partial page, in the shares of the warps that zero them."""
    return tuple(f"tail_{half}{stage}.{w}" for w in range(warps))


def ropes(stage: int, warps: int) -> tuple[str, ...]:
    """The rope columns, in the shares of the warps that put P there."""
    return tuple(f"rope{stage}.{w}" for w in range(warps))


def halves(stage: int, half: str, warps: int) -> tuple[str, ...]:
    """Everything that a page brings into one half of a stage."""
    own = (f"{half}{stage}", *tails(stage, half, warps))
    return (*own, *ropes(stage, warps)) if half == "high" else own


def holding(label: Label, regions: Sequence[str]) -> Reads:
    return tuple((region, label) for region in regions)


def values(page: Page, stage: int, half: str, warps: int) -> Reads:
    tail = ("zero", page.serial) if page.partial else k(page)
    return (*holding(k(page), [f"{half}{stage}"]), *holding(tail, tails(stage, half, warps)))


# --- Roles.


def stream_pages(items: Sequence[Item], warps: int) -> Iterator[Step]:
    ring = Ring()
    for page in (page for item in items for page in item):
        for half in HALVES:
            yield ring.empty(f"{half}_empty")
            yield Copy(halves(ring.stage, half, warps), k(page), f"{half}_full{ring.stage}")
        ring.advance()


def stream_queries(items: Sequence[Item], warp: int) -> Iterator[Step]:
    q = Ring(stages=1)
    for index, item in enumerate(items):
        if not item:
            continue
        yield q.empty("q_empty")
        yield Store(f"q.{warp}", ("q", index))
        yield Arrive("q_full0", ("q", index))
        q.advance()


def run_left(items: Sequence[Item], warp: int, warps: int) -> Iterator[Step]:
    ring, q = Ring(), Ring(stages=1)

    def scores(index: int, page: Page) -> Iterator[Step]:
        """Two MMAs: the kernel waits for a page's columns group by group."""
        for half in HALVES:
            yield ring.full(f"{half}_full")
            rope = ropes(ring.stage, warps) if half == "high" else ()
            query = tuple(f"q.{w}" for w in range(warps))
            yield Mma((*holding(("q", index), query), *holding(k(page), [f"{half}{ring.stage}", *rope])))

    for index, item in enumerate(items):
        if not item:
            continue
        yield q.full("q_full")
        q.advance()
        for page in item:
            stage = ring.stage
            yield from scores(index, page)
            yield MmaWait(0)
            if page.last:
                yield Arrive("q_empty0", ("q", index))
            yield from sync("left_group", p(page))
            if page.partial:
                yield from zero_tail(page, stage, "low", warp)
                yield from sync("left_group", ("zero", page.serial))
            yield Mma(values(page, stage, "low", warps))
            yield Store(f"rope{stage}.{warp}", p(page))
            yield Store(f"factors{stage}.{warp}", factors(page))
            yield BarArrive(f"p_ready{stage}", p(page))
            yield MmaWait(0)
            yield Arrive(f"low_empty{stage}", k(page))
            ring.advance()


def run_right(items: Sequence[Item], warp: int, warps: int) -> Iterator[Step]:
    ring = Ring()
    for page in (page for item in items for page in item):
        stage = ring.stage
        yield ring.full("high_full")  # not the low half: the left side may already have had it refilled
        if page.partial:
            yield from zero_tail(page, stage, "high", warp)  # p_ready is also the right group's own barrier
        yield from sync(f"p_ready{stage}", p(page))
        yield Load(f"factors{stage}.{warp}", factors(page))
        yield Mma((*holding(p(page), ropes(stage, warps)), *values(page, stage, "high", warps)))
        yield MmaWait(0)
        yield Arrive(f"high_empty{stage}", k(page))
        ring.advance()


def zero_tail(page: Page, stage: int, half: str, warp: int) -> Iterator[Step]:
    yield Store(f"tail_{half}{stage}.{warp}", ("zero", page.serial))


def sync(barrier: str, round_of: Label) -> Iterator[Step]:
    yield BarArrive(barrier, round_of)
    yield BarWait(barrier)


Edit = Callable[[str, list[Step]], list[Step]]


def protocol(work: Sequence[str], warps: int, edit: Edit = lambda role, steps: steps) -> Protocol:
    """The kernel's protocol over these items; `edit` may break a role's steps."""
    items = make_items(work)
    programs = {"pages": edit("pages", list(stream_pages(items, warps)))}
    for w in range(warps):
        programs[f"queries.{w}"] = edit("queries", list(stream_queries(items, w)))
        programs[f"left.{w}"] = edit("left", list(run_left(items, w, warps)))
        programs[f"right.{w}"] = edit("right", list(run_right(items, w, warps)))
    per_stage = {f"{half}_full{s}": 1 for half in HALVES for s in range(STAGES)}
    per_stage |= {f"{half}_empty{s}": warps for half in HALVES for s in range(STAGES)}
    return Protocol(
        programs,
        groups={f"{side}.{w}": side for side in ("left", "right") for w in range(warps)},
        mbarriers={"q_full0": warps, "q_empty0": warps, **per_stage},
        named_barriers={
            "left_group": warps,
            **{f"p_ready{s}": 2 * warps for s in range(STAGES)},
        },
    )


# --- The protocol holds.

SIZES = ("0", "1", "1p", "2", "2p", "3", "3p")
WORK_LISTS = [*product(SIZES, repeat=1), *product(SIZES, repeat=2), *product(("0", "1p", "2"), repeat=3)]


def test_no_order_of_execution_breaks_the_protocol() -> None:
    """Each warpgroup as one warp, over many lists of items."""
    for work in WORK_LISTS:
        explore(protocol(work, warps=1))


@pytest.mark.parametrize("work", [("3p",), ("2", "1p"), ("1p", "0", "1")])
def test_warps_of_a_group_may_drift_apart(work: tuple[str, ...]) -> None:
    assert explore(protocol(work, warps=2)) > 1000


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
        if isinstance(step, (BarArrive, BarWait)) and step.barrier == "p_ready1":
            return [step._replace(barrier="p_ready0")]
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


def also_wait_for_low_half(step: Step) -> list[Step]:
    if isinstance(step, Wait) and step.barrier.startswith("high_full"):
        return [step._replace(barrier=step.barrier.replace("high", "low")), step]
    return [step]


def never_flip_parity(step: Step) -> list[Step]:
    return [step._replace(parity=0) if isinstance(step, Wait) else step]


MUTANTS: dict[str, tuple[Edit, str]] = {
    "one P-ready barrier for both stages": (one_p_ready_barrier, "arrives at p_ready0"),
    "the left side does not say that P is ready": (without("left", BarArrive, "p_ready"), "deadlock"),
    "the right side does not wait for P": (without("right", BarWait, "p_ready"), "expects"),
    "the right side waits for the half that the left side frees": (
        edited("right", also_wait_for_low_half),
        "may still wait for phase|waits for phase",
    ),
    "the right side reads the factors after its release": (factors_after_release, "right.*load expects"),
    "a parity that never flips": (edited("right", never_flip_parity), "stands for another phase"),
    "the left half is released during P V": (arrive_before_mma_wait("left", "low_empty"), "MMA of left is reading"),
    "the right half is released during P V": (arrive_before_mma_wait("right", "high_empty"), "MMA of right is reading"),
    "Q is released during S": (arrive_before_mma_wait("left", "q_empty"), "store of .'q'.* MMA of left is reading"),
    "P overwrites K during S": (
        edited("left", lambda step: [] if step == MmaWait(0) else [step]),
        "store of .'p'.* MMA of left is reading",
    ),
    "Q is loaded without waiting": (without("queries", Wait, "q_empty"), "arrives at q_full0"),
    "pages are loaded without waiting for the left side": (without("pages", Wait, "low_empty"), "copy of"),
    "pages are loaded without waiting for the right side": (without("pages", Wait, "high_empty"), "copy of"),
    "left reads V before the other warps have zeroed it": (no_wait_for_zeros, "expects .'zero'"),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_a_broken_protocol_is_caught(name: str) -> None:
    edit, message = MUTANTS[name]
    with pytest.raises(Violation, match=message):
        explore(protocol(("3p", "2"), warps=2, edit=edit))
