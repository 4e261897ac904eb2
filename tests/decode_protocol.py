"""The barrier protocol of kernels/sm90/decode.cuh, for `barrier_machine` to run in every order.

Each role below is the kernel's function of that name with everything but synchronisation and shared memory left out.
What the kernel has four or three of is modelled once or twice, as `Scale` says: enough for warps that drift apart and
for tiles that arrive out of turn.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

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
    Wait,
)

STAGES = 2
SIDES = ("left", "right")  # the consumer warpgroups, each with half of the columns of O and of V


@dataclass(frozen=True)
class Scale:
    """How many of its parts are modelled."""

    warps: int  # of a warpgroup, and that load Q; the kernel has 4, and 3
    groups: int  # of column tiles that arrive together, for each side, which frees them; the kernel has 2

    def groups_of(self, side: str) -> range:
        first = SIDES.index(side) * self.groups
        return range(first, first + self.groups)

    def all_groups(self) -> range:
        """Left to right; the rope columns come with the last one."""
        return range(2 * self.groups)


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
        return Wait(f"{barrier}_{self.stage}", self.parity, self.round)

    def empty(self, barrier: str) -> Wait:
        return Wait(f"{barrier}_{self.stage}", self.parity ^ 1, self.round - 1)


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


def tails(stage: int, group: int, scale: Scale) -> tuple[str, ...]:
    """Rows past the length of a partial page, in the shares of the warps that zero them."""
    return tuple(f"tail{group}_{stage}.{w}" for w in range(scale.warps))


def ropes(stage: int, group: int, scale: Scale) -> tuple[str, ...]:
    """The rope columns, if the group brings them, in the shares of the warps that put P there."""
    return tuple(f"rope_{stage}.{w}" for w in range(scale.warps) if group == scale.all_groups()[-1])


def columns(stage: int, group: int, scale: Scale) -> tuple[str, ...]:
    """Everything that one group of a page brings into a stage."""
    return (f"columns{group}_{stage}", *tails(stage, group, scale), *ropes(stage, group, scale))


def holding(label: Label, regions: Sequence[str]) -> Reads:
    return tuple((region, label) for region in regions)


def values(page: Page, stage: int, side: str, scale: Scale) -> Reads:
    tail = ("zero", page.serial) if page.partial else k(page)
    reads: Reads = ()
    for group in scale.groups_of(side):
        reads += (*holding(k(page), [f"columns{group}_{stage}"]), *holding(tail, tails(stage, group, scale)))
    return reads


# --- Roles.


def stream_pages(items: Sequence[Item], scale: Scale) -> Iterator[Step]:
    ring = Ring()
    for page in (page for item in items for page in item):
        for side in SIDES:
            yield ring.empty(f"{side}_empty")
            for group in scale.groups_of(side):
                yield Copy(columns(ring.stage, group, scale), k(page), f"kv_full{group}_{ring.stage}")
        ring.advance()


def stream_queries(items: Sequence[Item], warp: int) -> Iterator[Step]:
    q = Ring(stages=1)
    for index, item in enumerate(items):
        if not item:
            continue
        yield q.empty("q_empty")
        yield Store((f"q.{warp}",), ("q", index))
        yield Arrive("q_full_0", ("q", index))
        q.advance()


def run_left(items: Sequence[Item], warp: int, scale: Scale) -> Iterator[Step]:
    ring, q = Ring(), Ring(stages=1)

    def scores(index: int, page: Page) -> Iterator[Step]:
        query = holding(("q", index), [f"q.{w}" for w in range(scale.warps)])
        for group in scale.all_groups():
            yield ring.full(f"kv_full{group}")
            key = [f"columns{group}_{ring.stage}", *ropes(ring.stage, group, scale)]
            yield Mma((*query, *holding(k(page), key)))

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
                yield Arrive("q_empty_0", ("q", index))
            yield from sync("left_group", p(page))
            if page.partial:
                yield zero_tail(page, stage, "left", warp, scale)
                yield from sync("left_group", ("zero", page.serial))
            yield Mma(values(page, stage, "left", scale))
            yield Store((f"rope_{stage}.{warp}",), p(page))
            yield Store((f"factors_{stage}.{warp}",), factors(page))
            yield BarArrive(f"p_ready_{stage}", p(page))
            yield MmaWait(0)
            yield Arrive(f"left_empty_{stage}", k(page))
            ring.advance()


def run_right(items: Sequence[Item], warp: int, scale: Scale) -> Iterator[Step]:
    ring = Ring()
    for page in (page for item in items for page in item):
        stage = ring.stage
        for group in scale.groups_of("right"):  # no others: the left side may already have had them refilled
            yield ring.full(f"kv_full{group}")
        if page.partial:
            yield zero_tail(page, stage, "right", warp, scale)  # p_ready is also the right warpgroup's own barrier
        yield from sync(f"p_ready_{stage}", p(page))
        yield Load(f"factors_{stage}.{warp}", factors(page))
        probabilities = holding(p(page), ropes(stage, scale.all_groups()[-1], scale))
        yield Mma((*probabilities, *values(page, stage, "right", scale)))
        yield MmaWait(0)
        yield Arrive(f"right_empty_{stage}", k(page))
        ring.advance()


def zero_tail(page: Page, stage: int, side: str, warp: int, scale: Scale) -> Step:
    shares = tuple(f"tail{group}_{stage}.{warp}" for group in scale.groups_of(side))
    return Store(shares, ("zero", page.serial))


def sync(barrier: str, round_of: Label) -> Iterator[Step]:
    yield BarArrive(barrier, round_of)
    yield BarWait(barrier)


Edit = Callable[[str, list[Step]], list[Step]]


def protocol(work: Sequence[str], scale: Scale, edit: Edit = lambda role, steps: steps) -> Protocol:
    """The kernel's protocol over these items; `edit` may break a role's steps."""
    items = make_items(work)
    programs = {"pages": edit("pages", list(stream_pages(items, scale)))}
    for w in range(scale.warps):
        programs[f"queries.{w}"] = edit("queries", list(stream_queries(items, w)))
        programs[f"left.{w}"] = edit("left", list(run_left(items, w, scale)))
        programs[f"right.{w}"] = edit("right", list(run_right(items, w, scale)))
    per_stage = {f"kv_full{group}_{s}": 1 for group in scale.all_groups() for s in range(STAGES)}
    per_stage |= {f"{side}_empty_{s}": scale.warps for side in SIDES for s in range(STAGES)}
    return Protocol(
        programs,
        groups={f"{side}.{w}": side for side in SIDES for w in range(scale.warps)},
        mbarriers={"q_full_0": scale.warps, "q_empty_0": scale.warps, **per_stage},
        named_barriers={
            "left_group": scale.warps,
            **{f"p_ready_{s}": 2 * scale.warps for s in range(STAGES)},
        },
    )
