"""The consumers of kernels/sm90/few_rows/decode.cuh, as `decode_roles` has those of decode.cuh. The producer is the
same. Left out is what a warp keeps to itself (`Room`), and `growth`, which is stored and read with `maximum`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

from tests.barrier_steps import Arrive, Fence, Label, Load, Mma, MmaWait, Step, Store, Wait
from tests.decode_pages import Item, Page, Ring, Scale, holding, of_page, p, pv, q, rope, s, values
from tests.decode_protocol import Consumers
from tests.decode_roles import load_first_queries, start_scores, sync, zero_tail

QUERY_PARTS = 1


def must_rescale(page: Page) -> bool:
    """By the scores, in the kernel: any page but the first may, or may not."""
    return page.first or page.serial % 2 == 0


def load(region: str, label: Label) -> Load:
    """No copy ever writes to what consumers load."""
    return Load(region, label, until_arrival=True)


def by_warp(name: str, scale: Scale) -> tuple[str, ...]:
    """The lines of a `ByWarp`."""
    return tuple(f"{name}.{w}" for w in range(scale.warps))


def get(name: str, label: Label, scale: Scale) -> Iterator[Step]:
    for line in by_warp(name, scale):
        yield load(line, label)


def exchange(name: str, label: Label, group: str, warp: int, scale: Scale) -> Iterator[Step]:
    yield Store((by_warp(name, scale)[warp],), label)
    yield from sync(group, label)
    yield from get(name, label, scale)


class Sums:
    """As in the kernel: parities by stage, beside them the phases that they stand for."""

    def __init__(self, scale: Scale) -> None:
        self.scale = scale
        self.rounds = [0] * scale.left_stages

    def wait(self, page: Page, stage: int) -> Iterator[Step]:
        yield Wait(f"sum_full_{stage}", self.rounds[stage] % 2, self.rounds[stage])
        self.rounds[stage] += 1
        yield from get(f"sum_{stage}", p(page), self.scale)


def start_values(page: Page, stage: int, p_stage: int, side: str, scale: Scale) -> Mma:
    return Mma((*values(page, stage, side, scale), *holding(p(page), rope(p_stage, scale))))


def run_left(items: Sequence[Item], warp: int, scale: Scale, whole: Collection[int] = ()) -> Iterator[Step]:
    """`whole`: items that are not cut, whose output needs no scale that all warps agree on."""
    ring, right_ring, q_ring = Ring(scale.left_stages), Ring(scale.right_stages), Ring(1)
    sums = Sums(scale)
    for index, item in enumerate(items):
        if not item:
            continue
        yield q_ring.full("q_full0")
        q_ring.advance()
        for page in item:
            stage = ring.stage
            yield from start_scores(index, page, ring, right_ring, scale, QUERY_PARTS)
            yield MmaWait(s(page))
            if page.final:
                yield Arrive("q_empty_0", q(index))
            if not page.first:
                yield from sync("left_group", of_page("vote", page))
            if must_rescale(page):
                yield from exchange("maximum", of_page("maximum", page), "left_group", warp, scale)
                if not page.first and warp == 0:
                    yield Store((f"rescale_{stage}",), p(page))
            yield Store((f"must_rescale_{stage}.{warp}", f"rope_{stage}.{warp}"), p(page))
            if page.partial:
                yield from zero_tail(page, stage, "left", warp, scale)
            yield Fence(p(page))
            yield Arrive(f"p_full_{stage}", p(page))
            yield ring.full("p_full")
            yield start_values(page, stage, stage, "left", scale)
            if page.final:
                yield Store((f"sum_{stage}.{warp}",), p(page))
                yield Arrive(f"sum_full_{stage}", p(page))
                yield from sums.wait(page, stage)
            yield MmaWait(pv(page))
            yield Arrive(f"left_empty_{stage}", pv(page))
            ring.advance()
            right_ring.advance()
        if index not in whole:
            yield from exchange("left_largest", f"largest {index}", "left_group", warp, scale)


def run_right(items: Sequence[Item], warp: int, scale: Scale, whole: Collection[int] = ()) -> Iterator[Step]:
    ring, p_ring = Ring(scale.right_stages), Ring(scale.left_stages)
    sums = Sums(scale)
    odd = 0
    yield from load_first_queries(items, warp, QUERY_PARTS)
    for index, item in enumerate(items):
        for page in item:
            stage, p_stage = ring.stage, p_ring.stage
            for pair in range(scale.pairs):
                yield ring.full(f"right_full{pair}")
            if page.partial:
                yield from zero_tail(page, stage, "right", warp, scale)
                yield from sync("right_group", of_page("zero", page))
            yield p_ring.full("p_full")
            if not page.first:
                yield load(f"must_rescale_{p_stage}.{warp}", p(page))
                if must_rescale(page):
                    yield load(f"rescale_{p_stage}", p(page))
            yield start_values(page, stage, p_stage, "right", scale)
            if page.final:
                yield from sums.wait(page, p_stage)
            yield MmaWait(pv(page))
            yield Arrive(f"rope_empty_{p_stage}", pv(page))
            yield Arrive(f"right_empty_{stage}", pv(page))
            ring.advance()
            p_ring.advance()
        if item and index not in whole:
            yield from exchange(f"right_largest_{odd}", f"largest {index}", "right_group", warp, scale)
            odd ^= 1  # here alone: nobody knows that all have read a buffer until they meet at the other one


FEW_ROWS = Consumers(run_left, run_right, lambda scale: QUERY_PARTS, own_barriers=("sum_full",))
