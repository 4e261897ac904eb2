"""The tile scheduler, as a readable specification. The device scheduler must equal it, element for element.

A decode step reads, for every request, its KV pages of 64 tokens. One *part* is one thread block per
(row tile, KV head), so `num_sms // row_tiles` parts run at once and each reads a page once for 64 query rows.
The scheduler turns lengths into *work items* (a run of pages of one request) and gives each part a list of them:

1. **Cap and deal.** A request longer than a cap is cut into near-equal pieces, none longer than the cap. Pieces are
   sorted, costliest first, and dealt in rounds of one per part: the costliest piece of a round goes to the least loaded
   part. After every round the loads of two parts differ by at most one piece (`max(load) - min(load) <= max(cost of an
   item)`), and later rounds deal ever smaller pieces. Good for batches whose requests divide the parts evenly.
2. **Level.** All requests are laid end to end and cut wherever a part's equal share of the cost ends: the loads of two
   parts differ by a page or two and an item. Good for ragged batches.
3. **Choose.** "No cut", for m = 1 .. ROUNDS the smallest cap that yields at most m pieces per part, caps of one,
   one and a quarter and one and a half times a part's mean of pages, and level are tried; the cost model picks the
   cheapest (busiest part, or reading all pages if that takes longer, + reduction), the first of these on a tie. The
   caps by the mean cut only what would hold up the rest: good for short ragged batches, where partial results count.

In batch-invariant mode pieces are subtrees of leaves (see `leaves`): a request is cut into a power of two of them, none
smaller than a leaf. There are no caps by the mean and no level, but MAX_ROUNDS rounds; as in batches that are so large
that cuts at all parts' ends might be too many.

Pieces are whole pages. Whether a short request is worth a second one, with its prologue and a reduction, is for the
cost model to say.

Everything is integer arithmetic on lengths: the same input gives the same schedule, on any machine.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from flashmla_backend.leaves import leaf_count, max_leaves

TILE_TOKENS = 64
TILE_ROWS = 64
MAX_ROUNDS = 6  # pieces of a part on average, where anything is cut
ROUNDS = 3
MEAN_QUARTERS = (4, 5, 6)  # caps by the mean


class WorkItem(NamedTuple):
    """Pages [page_begin, page_end) of one request; `split` is its slot among the partial results, -1 if uncut."""

    request: int
    page_begin: int
    page_end: int
    split: int


@dataclass(frozen=True)
class CostModel:
    """Predicted nanoseconds on an H100; only their ratios steer the schedule."""

    page: int = 1400  # one 64-token page in a part that need not wait for memory
    item: int = 2400  # prologue (Q, first page) and epilogue of one work item
    empty_item: int = 300  # a request without tokens only stores zeros
    memory: int = 24  # reading one page, when all parts share the memory: they finish together, whoever is ahead
    reduction: int = 2000  # launching the combine ...
    partial_row: int = 750  # ... and picoseconds for storing and reading back one row of a partial result, 1 KB

    def of_item(self, pages: int) -> int:
        return self.item + pages * self.page if pages else self.empty_item

    def of_parts(self, loads: Sequence[int], pages: int) -> int:
        """The busiest part; or, where memory is too slow for all parts, reading all pages and half of what the busiest
        part has more than the mean: it reads faster once others are done."""
        most, mean = max(loads), sum(loads) // len(loads)
        return max(most, pages * self.memory + (most - mean) // 2)

    def of_partial(self, rows: int) -> int:
        return min(max(1, rows * self.partial_row // 1000), 65535)  # what the device takes

    def of_reduction(self, partials: int, rows: int) -> int:
        """Of `partials` partial results, `rows` rows each; their traffic is the whole machine's."""
        return 0 if partials == 0 else self.reduction + partials * self.of_partial(rows)


@dataclass(frozen=True)
class Schedule:
    """Work lists of all parts, and where each request's partial results lie.

    Request r owns the partial results split_offsets[r] .. split_offsets[r + 1]; none if it was not cut.
    """

    parts: tuple[tuple[WorkItem, ...], ...]
    split_offsets: tuple[int, ...]

    def loads(self, cost: CostModel | None = None) -> list[int]:
        """Predicted nanoseconds of each part."""
        model = cost or CostModel()
        return [sum(model.of_item(i.page_end - i.page_begin) for i in part) for part in self.parts]


def pages_of(tokens: int) -> int:
    """None of a length that is negative."""
    return -(-max(tokens, 0) // TILE_TOKENS)


def row_tiles_of(rows: int, h_kv: int) -> int:
    """Thread blocks that need the same part of the work: one per 64 query rows and KV head."""
    return -(-rows // TILE_ROWS) * h_kv


def num_parts(num_sms: int, row_tiles: int) -> int:
    return max(1, num_sms // row_tiles)


def max_items(batch: int, parts: int) -> int:
    """Upper bound of the number of work items, whatever the lengths: buffers of this size never move."""
    return max(batch, MAX_ROUNDS * parts)


def max_splits(parts: int) -> int:
    """Upper bound of the number of partial results: only into at most MAX_ROUNDS pieces per part is a batch cut."""
    return MAX_ROUNDS * parts


def make_schedule(
    seq_lens: Sequence[int],
    row_tiles: int,
    num_sms: int,
    rows: int | None = None,
    cost: CostModel | None = None,
    batch_invariant: bool = False,
) -> Schedule:
    """Work lists for one step.

    Args:
        seq_lens: [B] tokens in the cache per request, 0 allowed.
        row_tiles: `row_tiles_of(s_q * h_q / h_kv, h_kv)`.
        num_sms: thread blocks that run at once.
        rows: query rows of a request over all KV heads, s_q * h_q; full row tiles by default.
        batch_invariant: cut into subtrees of leaves only.
    """
    model = cost or CostModel()
    pages = [pages_of(n) for n in seq_lens]
    parts = num_parts(num_sms, row_tiles)
    most = max_leaves(row_tiles) if batch_invariant else None
    proposals = [deal(cut(pages, cap, most), parts, model) for cap in candidate_caps(pages, parts, most)]
    if most is None and (levelled := level(pages, parts, model)) is not None:
        proposals.append(levelled)
    counts, hands = min(
        ((piece_counts(hands, len(pages)), hands) for hands in proposals),
        key=lambda proposal: (
            model.of_parts(loads(proposal[1], model), sum(pages))
            + model.of_reduction(sum(count for count in proposal[0] if count > 1), rows or TILE_ROWS * row_tiles)
        ),
    )

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


Hands = list[list[Piece]]  # the pieces of each part


def piece_counts(hands: Hands, batch: int) -> list[int]:
    counts = [0] * batch
    for hand in hands:
        for piece in hand:
            counts[piece.request] += 1
    return counts


def loads(hands: Hands, cost: CostModel) -> list[int]:
    """Predicted nanoseconds of each part."""
    return [sum(cost.of_item(p.end - p.begin) for p in hand) for hand in hands]


def piece_count(pages: int, cap: int, most: int | None = None) -> int:
    count = max(1, -(-pages // cap))
    if most is None:
        return count
    power_of_two = 1 << (count - 1).bit_length()
    return min(power_of_two, leaf_count(pages, most))


def cut(pages: Sequence[int], cap: int, most: int | None = None) -> list[Piece]:
    """Cut each request into near-equal pieces of at most `cap` pages, in order.

    With at most `most` leaves a request: into subtrees, which are larger than the cap where leaves are.
    """
    return [
        Piece(request, j, n * j // count, n * (j + 1) // count)
        for request, n in enumerate(pages)
        for count in [piece_count(n, cap, most)]
        for j in range(count)
    ]


def candidate_caps(pages: Sequence[int], parts: int, most: int | None = None) -> list[int]:
    """Caps to try: no cut; the smallest caps that keep to m pieces per part; caps by the mean."""
    longest = max([1, *pages])
    caps = [longest]
    by_mean = most is None and has_room_for_cuts(len(pages), parts)
    for rounds in range(1, (ROUNDS if by_mean else MAX_ROUNDS) + 1):
        if len(pages) > rounds * parts:
            continue
        low, high = 1, longest
        while low < high:  # the number of pieces falls as the cap grows
            middle = (low + high) // 2
            if sum(piece_count(n, middle, most) for n in pages) <= rounds * parts:
                high = middle
            else:
                low = middle + 1
        caps.append(low)
    if by_mean:
        caps += [min(max(1, -(-sum(pages) * quarters // (4 * parts))), longest) for quarters in MEAN_QUARTERS]
    return caps


def has_room_for_cuts(batch: int, parts: int) -> bool:
    """For as many more pieces as there are parts."""
    return batch + parts <= MAX_ROUNDS * parts


def deal(pieces: Sequence[Piece], parts: int, cost: CostModel) -> Hands:
    """Give every part its pieces, costliest first."""
    hands: Hands = [[] for _ in range(parts)]
    loads = [0] * parts
    costs = {piece: cost.of_item(piece.end - piece.begin) for piece in pieces}
    by_cost = sorted(pieces, key=lambda p: (-costs[p], p.request, p.number))
    for start in range(0, len(by_cost), parts):
        least_loaded = sorted(range(parts), key=lambda part: (loads[part], part))
        for part, piece in zip(least_loaded, by_cost[start : start + parts], strict=False):
            hands[part].append(piece)
            loads[part] += costs[piece]
    return hands


def level(pages: Sequence[int], parts: int, cost: CostModel) -> Hands | None:
    """Lay the requests end to end and cut at every part's equal share; None where the pieces would be too many or
    smaller than a page."""
    if not has_room_for_cuts(len(pages), parts):
        return None
    starts = [0]
    for n in pages:
        starts.append(starts[-1] + cost.of_item(n))
    share = -(-starts[-1] // parts)
    if share < cost.item + cost.page:
        return None

    hands: Hands = []
    request = begin = number = 0
    for part in range(1, parts + 1):
        last, end = cut_at(part * share, pages, starts, cost)
        hand = []
        while (request, begin) < (last, end):
            stop = end if request == last else pages[request]
            hand.append(Piece(request, number, begin, stop))
            if request == last:
                begin, number = stop, number + 1
            else:
                request, begin, number = request + 1, 0, 0
        hands.append(hand)
    return hands


def cut_at(position: int, pages: Sequence[int], starts: Sequence[int], cost: CostModel) -> tuple[int, int]:
    """Request and page where the line of requests is cut: the last page boundary at or before `position`."""
    if position >= starts[-1]:
        return len(pages), 0
    request = bisect_right(starts, position) - 1
    return request, max(position - starts[request] - cost.item, 0) // cost.page
