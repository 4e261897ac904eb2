"""What the roles of the decode kernel share in the model of its barriers: the work, the rings, and shared memory.

What the kernel has four or two of is modelled once or twice, as `Scale` says: enough for warps that drift apart and for
tiles that arrive out of turn.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from tests.barrier_steps import Label, Reads, Wait


@dataclass(frozen=True)
class Scale:
    """How many of its parts are modelled, and the rings."""

    warps: int  # of a warpgroup, and of those that load Q; the kernel has 4, for Q of later items 2 that arrive twice
    pairs: int  # of column tiles, each with a barrier, in either half of a page; the kernel has 2
    left_stages: int = 2  # for left halves, rope tiles and P
    right_stages: int = 3
    blocks: int = 1  # of a cluster, which read the same pages; the kernel has 1 or 2


@dataclass
class Ring:
    """As in the kernel, and beside the parity the phase it is meant to stand for."""

    stages: int
    stage: int = 0
    parity: int = 0
    round: int = 0

    def advance(self) -> None:
        self.stage = (self.stage + 1) % self.stages
        if self.stage == 0:
            self.parity ^= 1
            self.round += 1

    def previous(self) -> Ring:
        wrap = self.stage == 0
        return Ring(self.stages, (self.stage - 1) % self.stages, self.parity ^ wrap, self.round - wrap)

    def full(self, barrier: str) -> Wait:
        return Wait(f"{barrier}_{self.stage}", self.parity, self.round)

    def empty(self, barrier: str) -> Wait:
        return Wait(f"{barrier}_{self.stage}", self.parity ^ 1, self.round - 1)


@dataclass(frozen=True)
class Page:
    serial: int
    partial: bool  # it has rows past the length, which must be zeroed before they are read as V
    first: bool  # of its leaf, or in free mode of its item
    last: bool
    final: bool  # of its item


Item = tuple[Page, ...]


def make_items(work: Sequence[str]) -> list[Item]:
    """ "2" is an item of two pages, "2p" the same with a partial last page, "2+1" one of two leaves."""
    items, serial = [], 0
    for text in work:
        leaves = [int(leaf) for leaf in text.rstrip("p").split("+")]
        pages = [(i == 0, i + 1 == count) for count in leaves for i in range(count)]
        item = []
        for at, (first, last) in enumerate(pages):
            final = at + 1 == len(pages)
            item.append(Page(serial + at, text.endswith("p") and final, first, last, final))
        items.append(tuple(item))
        serial += len(pages)
    return items


# --- Shared memory: what a page's data is called while it is K, zero-filled V, or P.


def q(item: int) -> Label:
    return f"q {item}"


def of_page(what: str, page: Page) -> Label:
    return f"{what} {page.serial}"


k, zero, s, p, pv = (partial(of_page, what) for what in ("k", "zero", "s", "p", "pv"))


def tails(side: str, pair: int, stage: int, scale: Scale) -> tuple[str, ...]:
    """Rows past the length of a partial page, in the shares of the warps that zero them. S may read anything there."""
    return tuple(tail for loader in range(scale.blocks) for tail in tails_of_tile(side, pair, stage, loader, scale))


def tails_of_tile(side: str, pair: int, stage: int, loader: int, scale: Scale) -> tuple[str, ...]:
    return tuple(f"{side}_tail{pair}{loader}_{stage}.{w}" for w in range(scale.warps))


def tiles(side: str, pair: int, stage: int, scale: Scale) -> tuple[str, ...]:
    """A pair of column tiles, in as many parts as there are blocks that load it."""
    return tuple(f"{side}{pair}{loader}_{stage}" for loader in range(scale.blocks))


def rope(stage: int, scale: Scale) -> tuple[str, ...]:
    """A rope tile, in the shares of the warps that put P there."""
    return tuple(f"rope_{stage}.{w}" for w in range(scale.warps))


def holding(label: Label, regions: Sequence[str]) -> Reads:
    return tuple((region, label) for region in regions)


def values(page: Page, stage: int, side: str, scale: Scale) -> Reads:
    tail = zero(page) if page.partial else k(page)
    reads: Reads = ()
    for pair in range(scale.pairs):
        reads += holding(k(page), tiles(side, pair, stage, scale)) + holding(tail, tails(side, pair, stage, scale))
    return reads
