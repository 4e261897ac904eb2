"""The barrier protocols of the decode kernels, for `barrier_machine` to run: the roles of one thread block, or of
several, a cluster, each of which runs all of them. Kernels differ in their consumers. `placed` says what of a role's
steps reaches the other blocks.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from tests.barrier_steps import Arrive, BarArrive, BarWait, Copy, Load, Mma, Protocol, Step, Store, Wait
from tests.decode_pages import Item, Scale, make_items
from tests.decode_roles import (
    query_parts,
    rope_loader,
    run_left,
    run_right,
    stream_left,
    stream_queries,
    stream_right,
)

Edit = Callable[[str, list[Step]], list[Step]]
Role = Callable[[Sequence[Item], int, Scale], Iterator[Step]]  # by a warp


@dataclass(frozen=True)
class Consumers:
    run_left: Role
    run_right: Role
    query_parts: Callable[[Scale], int]  # that Q arrives in
    own_barriers: tuple[str, ...] = ()  # of each left stage, where all warps of the left side arrive


DECODE = Consumers(run_left, run_right, query_parts)


def as_it_is(role: str, steps: list[Step]) -> list[Step]:
    return steps


def protocol(
    work: Sequence[str],
    scale: Scale,
    edit: Edit = as_it_is,
    scale_of: Mapping[str, Scale] | None = None,
    consumers: Consumers = DECODE,
) -> Protocol:
    """A kernel's protocol over these items. `edit` may break a role's steps, `scale_of` give a role other rings."""
    items = make_items(work)
    other = scale_of or {}
    parts = consumers.query_parts(scale)
    programs: dict[str, list[Step]] = {}
    mbarriers: dict[str, int] = {}
    block_of: dict[str, tuple[str, ...]] = {}
    for block in range(scale.blocks):

        def add(name: str, role: str, steps: Iterator[Step], block: int = block) -> None:
            edited = edit(role, list(steps))
            programs[on(block, name, scale)] = [one for step in edited for one in placed(step, block, scale)]

        add("stream_left", "stream_left", stream_left(items, other.get("stream_left", scale), block, parts))
        add("stream_right", "stream_right", stream_right(items, other.get("stream_right", scale), block, parts))
        for w in range(scale.warps):
            add(f"queries.{w}", "queries", stream_queries(items, w, parts))
            add(f"left.{w}", "left", consumers.run_left(items, w, other.get("left", scale)))
            add(f"right.{w}", "right", consumers.run_right(items, w, other.get("right", scale)))
        of_block = mbarriers_of_block(scale, consumers)
        own = {on(block, barrier, scale): arrivals for barrier, arrivals in of_block.items()}
        mbarriers |= own
        block_of |= dict.fromkeys(own, tuple(name for name in programs if name.endswith(on(block, "", scale))))
    groups = {
        on(block, f"{side}_group", scale): scale.warps for side in ("left", "right") for block in range(scale.blocks)
    }
    return Protocol(programs, mbarriers, groups, block_of)


def mbarriers_of_block(scale: Scale, consumers: Consumers) -> dict[str, int]:
    """And how many arrivals complete a phase."""
    releases = scale.warps * scale.blocks
    own_expect = 1 if scale.blocks > 1 else 0
    mbarriers = {f"q_full{part}_0": scale.warps for part in range(consumers.query_parts(scale))}
    mbarriers["q_empty_0"] = scale.warps
    for stage in range(scale.left_stages):
        mbarriers |= {f"left_full{pair}_{stage}": own_expect + scale.blocks for pair in range(scale.pairs)}
        mbarriers |= {f"rope_full_{stage}": own_expect + 1, f"p_full_{stage}": scale.warps}
        mbarriers |= {f"{barrier}_{stage}": releases for barrier in ("left_empty", "rope_empty")}
        mbarriers |= {f"{barrier}_{stage}": scale.warps for barrier in consumers.own_barriers}
    for stage in range(scale.right_stages):
        mbarriers |= {f"right_full{pair}_{stage}": own_expect + scale.blocks for pair in range(scale.pairs)}
        mbarriers |= {f"right_empty_{stage}": releases, f"scores_issued_{stage}": scale.warps}
    return mbarriers


# --- Where it all lies, with several blocks.


def on(block: int, name: str, scale: Scale) -> str:
    return f"{name}@{block}" if scale.blocks > 1 else name


def placed(step: Step, block: int, scale: Scale) -> Iterator[Step]:
    """A step of this block's: copies go to all blocks, and releases of a slot to all that fill some of it."""

    def all_on(names: Sequence[str], target: int) -> tuple[str, ...]:
        return tuple(on(target, name, scale) for name in names)

    match step:
        case Copy(regions, label, barrier):
            for target in range(scale.blocks):
                yield Copy(all_on(regions, target), label, on(target, barrier, scale))
        case Arrive(barrier, label) if barrier.startswith("rope_empty"):
            yield Arrive(on(rope_loader(int(barrier[-1]), scale), barrier, scale), label)
        case Arrive(barrier, label) if re.match("(left|right)_empty", barrier):
            for target in range(scale.blocks):
                yield Arrive(on(target, barrier, scale), label)
        case Store(regions, label):
            yield Store(all_on(regions, block), label)
        case Load():
            yield step._replace(region=on(block, step.region, scale))
        case Mma(reads):
            yield Mma(tuple((on(block, region, scale), label) for region, label in reads))
        case Wait() | Arrive() | BarArrive() | BarWait():
            yield step._replace(barrier=on(block, step.barrier, scale))
        case _:
            yield step
