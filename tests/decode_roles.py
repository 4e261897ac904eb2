"""The roles of kernels/sm90/decode.cuh, with everything but synchronisation and shared memory left out: each function
below is the kernel's of that name. `decode_pages` says what they share; `decode_protocol` puts them together.

A warp is one program: the compiler lets its lanes meet again after every wait. A copy is whatever completes on one
barrier together: with small pages two or four boxes of each tile.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import product

from tests.barrier_steps import (
    Arrive,
    BarArrive,
    BarWait,
    Copy,
    Fence,
    Label,
    Load,
    Mma,
    MmaWait,
    Reads,
    Step,
    Store,
    Wait,
)
from tests.decode_pages import (
    Item,
    Page,
    Ring,
    Scale,
    holding,
    k,
    p,
    pv,
    q,
    rope,
    s,
    tails_of_tile,
    tiles,
    values,
    zero,
)

# --- The producer's roles.


def waits_for_queries(items: Sequence[Item]) -> bool:
    return bool(items) and len(items[0]) in (2, 3)


def stream_half(page: Page, ring: Ring, side: str, scale: Scale, block: int) -> Iterator[Step]:
    stage = ring.stage
    yield ring.empty(f"{side}_empty")
    yield ring.previous().full(f"{side}_full{scale.pairs - 1}")
    for pair in range(scale.pairs):
        full = f"{side}_full{pair}_{stage}"
        yield from expect(full, page, scale)
        tile = tiles(side, pair, stage, scale)[block]
        yield Copy((tile, *tails_of_tile(side, pair, stage, block, scale)), k(page), full)


def expect(full: str, page: Page, scale: Scale) -> Iterator[Step]:
    """What a block does on its own barrier before all blocks' bytes of the page complete there; if they are its own
    alone they cannot come before, and this goes without saying."""
    if scale.blocks > 1:
        yield Arrive(full, k(page))


def rope_loader(stage: int, scale: Scale) -> int:
    """The block that waits until a slot is free in all blocks and loads for all."""
    return stage % scale.blocks


def wait_until_empty(ring: Ring, barrier: str, stages: Sequence[int]) -> Iterator[Step]:
    """After the last page, of the slots that this block fills."""
    rest = replace(ring)
    for _ in range(rest.stages):
        if rest.round > 0 and rest.stage in stages:  # in round 0 nothing was ever loaded there
            yield rest.empty(barrier)
        rest.advance()


def stream_left(items: Sequence[Item], scale: Scale, block: int, parts: int) -> Iterator[Step]:
    ring = Ring(scale.left_stages)
    hold = waits_for_queries(items)
    for page in (page for item in items for page in item):
        yield from stream_half(page, ring, "left", scale, block)
        loads = rope_loader(ring.stage, scale) == block
        if loads:
            yield ring.empty("rope_empty")
        yield from expect(f"rope_full_{ring.stage}", page, scale)
        if loads:
            yield Copy(rope(ring.stage, scale), k(page), f"rope_full_{ring.stage}")
        if hold:
            yield Wait(f"q_full{parts - 1}_0", parity=0, round=0)
        hold = False
        ring.advance()
    if scale.blocks > 1:
        stages = range(scale.left_stages)
        yield from wait_until_empty(ring, "left_empty", stages)
        yield from wait_until_empty(ring, "rope_empty", [at for at in stages if rope_loader(at, scale) == block])


def stream_right(items: Sequence[Item], scale: Scale, block: int, parts: int) -> Iterator[Step]:
    ring = Ring(scale.right_stages)
    hold = waits_for_queries(items)
    for page in (page for item in items for page in item):
        yield from stream_half(page, ring, "right", scale, block)
        if hold:
            yield Wait(f"q_full{parts - 1}_0", parity=0, round=0)
        hold = False
        ring.advance()
    if scale.blocks > 1:
        yield from wait_until_empty(ring, "right_empty", range(scale.right_stages))


def load_queries(index: int, warp: int, parts: int) -> Iterator[Step]:
    for part in range(parts):
        yield Store((f"q{part}.{warp}",), q(index))
        yield Fence(q(index))  # with the wait for this warp's own cp.async
        yield Arrive(f"q_full{part}_0", q(index))


def with_pages(items: Sequence[Item]) -> list[int]:
    return [index for index, item in enumerate(items) if item]


def load_first_queries(items: Sequence[Item], warp: int, parts: int) -> Iterator[Step]:
    for index in with_pages(items)[:1]:
        yield from load_queries(index, warp, parts)


def stream_queries(items: Sequence[Item], warp: int, parts: int) -> Iterator[Step]:
    ring = Ring(1)
    for index in with_pages(items)[1:]:
        ring.advance()
        yield ring.empty("q_empty")
        yield from load_queries(index, warp, parts)


# --- The consumers' roles.


def zero_tail(page: Page, stage: int, side: str, warp: int, scale: Scale) -> Iterator[Step]:
    parts = product(range(scale.pairs), range(scale.blocks))
    yield Store(tuple(tails_of_tile(side, pair, stage, loader, scale)[warp] for pair, loader in parts), zero(page))
    yield Fence(zero(page))


def sync(barrier: str, label: Label) -> Iterator[Step]:
    yield BarArrive(barrier, label)
    yield BarWait(barrier)


def query_parts(scale: Scale) -> int:
    """What goes with each pair of a page's left half, and the rest in shared memory."""
    return scale.pairs + 1


def start_scores(
    index: int, page: Page, ring: Ring, right_ring: Ring, scale: Scale, parts: int, queries: Ring | None = None
) -> Iterator[Wait | Mma]:
    """`parts`: of Q; `queries`: if each must be waited for."""

    def query(part: int) -> Reads:
        return holding(q(index), [f"q{part}.{w}" for w in range(scale.warps)])

    for side, half in ("left", ring), ("right", right_ring):
        for pair in range(scale.pairs):
            part = min(pair if side == "left" else scale.pairs, parts - 1)
            if queries and (side == "left" or pair == 0):
                yield queries.full(f"q_full{part}")
            yield half.full(f"{side}_full{pair}")
            yield Mma((*query(part), *holding(k(page), tiles(side, pair, half.stage, scale))))
    yield ring.full("rope_full")
    yield Mma((*query(parts - 1), *holding(k(page), rope(ring.stage, scale))))


def pairs_ahead(scale: Scale) -> int:
    """Of the next page's S, before a page is freed."""
    return 1 if scale.blocks > 1 else 0


def run_left(items: Sequence[Item], warp: int, scale: Scale) -> Iterator[Step]:
    ring, right_ring, q_ring = Ring(scale.left_stages), Ring(scale.right_stages), Ring(1)
    for index, item in enumerate(items):
        if not item:
            continue
        yield from start_scores(index, item[0], ring, right_ring, scale, query_parts(scale), q_ring)
        q_ring.advance()
        yield Arrive(f"scores_issued_{right_ring.stage}", s(item[0]))
        yield MmaWait(s(item[0]))
        for at, page in enumerate(item):
            stage = ring.stage
            if page.final:
                yield Arrive("q_empty_0", q(index))
            yield from sync("left_group", s(page))
            if page.partial:
                yield from zero_tail(page, stage, "left", warp, scale)
                yield from sync("left_group", zero(page))
            yield Mma(values(page, stage, "left", scale))
            yield Store((f"rope_{stage}.{warp}", f"rescale_{stage}.{warp}"), p(page))
            if page.last:
                yield Store((f"inverse_sum_{stage}.{warp}",), p(page))
            hand_over = Fence(p(page)), Arrive(f"p_full_{stage}", p(page))
            ring.advance()
            right_ring.advance()
            if page.final:
                yield from hand_over
                yield MmaWait(pv(page))
                yield Arrive(f"left_empty_{stage}", pv(page))
                break
            scores = list(start_scores(index, item[at + 1], ring, right_ring, scale, query_parts(scale)))
            ahead = scores[: 2 * pairs_ahead(scale)]
            yield from ahead
            yield from hand_over
            yield MmaWait(pv(page), tuple(read for step in ahead if isinstance(step, Mma) for read in step.reads))
            yield Arrive(f"left_empty_{stage}", pv(page))
            yield from scores[len(ahead) :]
            yield Arrive(f"scores_issued_{right_ring.stage}", s(item[at + 1]))
            yield MmaWait(s(item[at + 1]))


def run_right(items: Sequence[Item], warp: int, scale: Scale) -> Iterator[Step]:
    ring, p_ring = Ring(scale.right_stages), Ring(scale.left_stages)
    yield from load_first_queries(items, warp, query_parts(scale))
    for page in (page for item in items for page in item):
        stage = ring.stage
        for pair in range(scale.pairs):
            yield ring.full(f"right_full{pair}")
        if page.partial:
            yield from zero_tail(page, stage, "right", warp, scale)
            yield from sync("right_group", zero(page))
        if page.first:
            yield ring.full("scores_issued")
        yield p_ring.full("p_full")
        if not page.first:
            yield Load(f"rescale_{p_ring.stage}.{warp}", p(page))
        if page.last:
            yield Load(f"inverse_sum_{p_ring.stage}.{warp}", p(page))
        yield Load(f"rope_{p_ring.stage}.{warp}", p(page))
        yield Fence(p(page))
        yield Arrive(f"rope_empty_{p_ring.stage}", p(page))
        ring.advance()
        if not page.last:
            yield ring.full("scores_issued")
        yield Mma(values(page, stage, "right", scale))
        yield MmaWait(pv(page))
        yield Arrive(f"right_empty_{stage}", pv(page))
        p_ring.advance()
