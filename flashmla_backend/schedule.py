"""The tile scheduler, as a readable specification. The device scheduler must equal it, element for element.

A decode step reads, for every request, its KV pages of 64 tokens. One *part* is one thread block per
(row tile, KV head), so `num_sms // row_tiles` parts run at once and each reads a page once for 64 query rows.
The scheduler turns lengths into *work items* (a run of pages of one request) and gives each part a list of them:

1. **Cut.** A request longer than a cap is cut into near-equal pieces, none longer than the cap. Short requests are
   never cut: a second piece costs a prologue and a reduction, more than it saves.
2. **Deal.** Pieces are sorted, costliest first, and dealt in rounds of one per part: the costliest piece of a round
   goes to the least loaded part. After every round the loads of two parts differ by at most one piece
   (`max(load) - min(load) <= max(cost of an item)`), and later rounds deal ever smaller pieces.
3. **Choose the cap.** For m = 1 .. MAX_ROUNDS the smallest cap that yields at most m pieces per part, and "no cut",
   are tried; the cost model picks the cheapest (busiest part + reduction), the fewest pieces on a tie.

Everything is integer arithmetic on lengths: the same input gives the same schedule, on any machine.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

TILE_TOKENS = 64
TILE_ROWS = 64
MAX_ROUNDS = 7
MIN_SPLIT_PAGES = 2  # the smallest piece worth a thread block; shorter than two of them is never cut


class WorkItem(NamedTuple):
    """Pages [page_begin, page_end) of one request; `split` is its slot among the partial results, -1 if uncut."""

    request: int
    page_begin: int
    page_end: int
    split: int


@dataclass(frozen=True)
class CostModel:
    """Predicted nanoseconds on an H100 with all SMs busy; only their ratios steer the schedule."""

    page: int = 1600  # one 64-token page when two or more row tiles share its trip through HBM
    lone_page: int = 3200  # the same when a single row tile reads it
    item: int = 2500  # prologue (Q, first page) and epilogue of one work item
    empty_item: int = 300  # a request without tokens only stores zeros
    reduction: int = 1300  # launching the combine ...
    reduction_per_split: int = 60  # ... and reading each partial result

    def of_item(self, pages: int, row_tiles: int) -> int:
        if pages == 0:
            return self.empty_item
        return self.item + pages * (self.lone_page if row_tiles == 1 else self.page)

    def of_reduction(self, splits: int) -> int:
        return 0 if splits <= 1 else self.reduction + splits * self.reduction_per_split


@dataclass(frozen=True)
class Schedule:
    """Work lists of all parts, costliest item first, and where each request's partial results lie.

    Request r owns the partial results split_offsets[r] .. split_offsets[r + 1]; none if it was not cut.
    """

    parts: tuple[tuple[WorkItem, ...], ...]
    split_offsets: tuple[int, ...]

    def loads(self, row_tiles: int, cost: CostModel | None = None) -> list[int]:
        """Predicted nanoseconds of each part."""
        model = cost or CostModel()
        return [sum(model.of_item(i.page_end - i.page_begin, row_tiles) for i in part) for part in self.parts]


def pages_of(tokens: int) -> int:
    return -(-tokens // TILE_TOKENS)


def row_tiles_of(rows: int, h_kv: int) -> int:
    """Thread blocks that need the same part of the work: one per 64 query rows and KV head."""
    return -(-rows // TILE_ROWS) * h_kv


def num_parts(num_sms: int, row_tiles: int) -> int:
    return max(1, num_sms // row_tiles)


def max_items(batch: int, parts: int) -> int:
    """Upper bound of the number of work items, whatever the lengths: buffers of this size never move."""
    return max(batch, MAX_ROUNDS * parts)


def max_splits(parts: int) -> int:
    """Upper bound of the number of partial results: only a batch of at most MAX_ROUNDS pieces per part is cut."""
    return MAX_ROUNDS * parts


def make_schedule(seq_lens: Sequence[int], row_tiles: int, num_sms: int, cost: CostModel | None = None) -> Schedule:
    """Work lists for one step.

    Args:
        seq_lens: [B] tokens in the cache per request, 0 allowed.
        row_tiles: `row_tiles_of(s_q * h_q / h_kv, h_kv)`.
        num_sms: thread blocks that run at once.
    """
    model = cost or CostModel()
    pages = [pages_of(n) for n in seq_lens]
    parts = num_parts(num_sms, row_tiles)
    best: tuple[int, list[int], list[list[Piece]]] | None = None
    for cap in candidate_caps(pages, parts):
        counts = [piece_count(n, cap) for n in pages]
        hands, busiest = deal(cut(pages, counts), parts, row_tiles, model)
        total = busiest + model.of_reduction(max(counts, default=1))
        if best is None or total < best[0]:
            best = (total, counts, hands)
    assert best is not None  # "no cut" is always a candidate
    _, counts, hands = best

    offsets = [0]
    for count in counts:
        offsets.append(offsets[-1] + (count if count > 1 else 0))
    return Schedule(
        parts=tuple(
            tuple(
                WorkItem(p.request, p.begin, p.end, offsets[p.request] + p.number if counts[p.request] > 1 else -1)
                for p in hand
            )
            for hand in hands
        ),
        split_offsets=tuple(offsets),
    )


class Piece(NamedTuple):
    request: int
    number: int
    begin: int
    end: int


def piece_count(pages: int, cap: int) -> int:
    return 1 if pages < 2 * MIN_SPLIT_PAGES else -(-pages // cap)


def cut(pages: Sequence[int], counts: Sequence[int]) -> list[Piece]:
    """Cut each request into its number of near-equal pieces, in order."""
    return [
        Piece(request, j, n * j // count, n * (j + 1) // count)
        for request, (n, count) in enumerate(zip(pages, counts, strict=True))
        for j in range(count)
    ]


def candidate_caps(pages: Sequence[int], parts: int) -> list[int]:
    """Caps to try, largest first: no cut, then the smallest cap that keeps to m pieces per part."""
    longest = max(max(pages, default=0), MIN_SPLIT_PAGES)
    caps = {longest}
    for rounds in range(1, MAX_ROUNDS + 1):
        if len(pages) > rounds * parts:
            continue
        low, high = MIN_SPLIT_PAGES, longest
        while low < high:  # the number of pieces falls as the cap grows
            middle = (low + high) // 2
            if sum(piece_count(n, middle) for n in pages) <= rounds * parts:
                high = middle
            else:
                low = middle + 1
        caps.add(low)
    return sorted(caps, reverse=True)


def deal(pieces: Sequence[Piece], parts: int, row_tiles: int, cost: CostModel) -> tuple[list[list[Piece]], int]:
    """Give every part its pieces; also the cost of the busiest part."""
    hands: list[list[Piece]] = [[] for _ in range(parts)]
    loads = [0] * parts
    costs = {piece: cost.of_item(piece.end - piece.begin, row_tiles) for piece in pieces}
    by_cost = sorted(pieces, key=lambda p: (-costs[p], p.request, p.number))
    for start in range(0, len(by_cost), parts):
        least_loaded = sorted(range(parts), key=lambda part: (loads[part], part))
        for part, piece in zip(least_loaded, by_cost[start : start + parts], strict=False):
            hands[part].append(piece)
            loads[part] += costs[piece]
    return hands, max(loads)
