"""The tile scheduler: coverage, offsets, balance, determinism, over random length sets."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from flashmla_backend import ops, sm90
from flashmla_backend.leaves import leaf_count
from flashmla_backend.schedule import (
    MAX_ROUNDS,
    ROUNDS,
    CostModel,
    Piece,
    Schedule,
    WorkItem,
    candidate_caps,
    cut,
    level,
    loads,
    make_schedule,
    max_items,
    max_splits,
    num_parts,
    pages_of,
    piece_count,
    row_tiles_of,
)

KERNELS = Path(__file__).parents[2] / "kernels"

lengths = st.one_of(
    st.lists(st.integers(0, 5000), max_size=150),
    st.lists(st.integers(0, 300), max_size=400),
    st.lists(st.integers(0, 1_048_576), max_size=12),
    st.lists(st.sampled_from([0, 1, 63, 64, 65, 127, 128, 192, 255, 256, 257, 4096]), max_size=200),
)
tiles = st.sampled_from([1, 2, 3, 4, 8, 16, 200])
sms = st.sampled_from([1, 2, 7, 78, 132])


# Lengths, row tiles, SMs; then each part's items as "request:pages", ">" and the slot of a partial result.
KNOWN = [
    ([], 1, 2, "idle | idle"),
    ([0, 0, 0], 1, 2, "0:0-0 2:0-0 | 1:0-0"),
    ([64], 1, 3, "0:0-1 | idle | idle"),
    ([128], 1, 3, "0:0-2 | idle | idle"),
    ([192], 1, 3, "0:0-1>0 | 0:1-2>1 | 0:2-3>2"),
    ([256], 1, 3, "0:0-2>0 | 0:2-4>1 | idle"),
    ([65 * 64], 1, 4, "0:48-65>3 | 0:0-16>0 | 0:16-32>1 | 0:32-48>2"),
    ([100, 5000, 64, 900], 1, 4, "0:0-2 1:0-20>0 | 1:20-46>1 | 1:46-72>2 | 1:72-79>3 2:0-1 3:0-15"),
    ([1000] * 5, 1, 4, "0:0-16 1:0-2>0 | 1:2-16>1 2:0-7>2 | 2:7-16>3 3:0-11>4 | 3:11-16>5 4:0-16"),
    ([2000, 100, 3000, 0, 700], 2, 7, "0:0-16>0 2:31-47>4 | 0:16-32>1 2:0-15>2 3:0-0 | 2:15-31>3 4:0-11 1:0-2"),
    ([64 * n for n in range(9, -1, -1)], 1, 3, "0:0-9 5:0-4 6:0-3 | 1:0-8 4:0-5 7:0-2 | 2:0-7 3:0-6 8:0-1 9:0-0"),
    ([640] * 4, 4, 16, "0:0-10 | 1:0-10 | 2:0-10 | 3:0-10"),
]


@pytest.mark.parametrize("seq_lens, row_tiles, num_sms, expected", KNOWN)
def test_known_schedules(seq_lens: list[int], row_tiles: int, num_sms: int, expected: str) -> None:
    def words(item: WorkItem) -> str:
        slot = f">{item.split}" if item.split >= 0 else ""
        return f"{item.request}:{item.page_begin}-{item.page_end}{slot}"

    made = make_schedule(seq_lens, row_tiles, num_sms)
    assert " | ".join(" ".join(map(words, part)) or "idle" for part in made.parts) == expected


def test_costs() -> None:
    """The figures that decode_smoke.cpp, which cannot ask for them, is given too."""
    cost = CostModel()
    assert [cost.of_item(pages) for pages in (0, 1, 3)] == [300, 3800, 6600]
    assert cost.of_parts([5000, 3000], pages=10) == 5000  # the busiest part
    assert cost.of_parts([5000, 3000, 2999], pages=1000) == 24_000 + 667  # memory, and half of 5000 - 3666
    assert cost.of_parts([5001, 3000, 2998], pages=1000) == 24_000 + 667
    assert [cost.of_partial(rows) for rows in (1, 64, 32767, 90000)] == [1, 48, 24575, 65535]
    assert [cost.of_reduction(partials, 64) for partials in (0, 1, 5)] == [0, 2048, 2240]
    smoke = (KERNELS / "tools" / "decode_smoke.cpp").read_text()
    assert f"p.cost = {{{', '.join(map(str, sm90.cost_of(64)))}}}" in smoke


def test_the_caller_may_set_costs_and_rows() -> None:
    dear = CostModel(reduction=1_000_000)
    assert make_schedule([64 * 40], 1, 4, cost=dear).split_offsets[-1] == 0
    assert make_schedule([64 * 40], 1, 4).split_offsets[-1] == 4
    assert make_schedule([64 * 40], 1, 4).loads(CostModel(item=0)) == [10 * 1400] * 4
    # What a cut saves, two pages, pays for the partial results of few rows only.
    assert make_schedule([256], 1, 3, rows=1).split_offsets[-1] == 2
    assert make_schedule([256], 1, 3, rows=2000).split_offsets[-1] == 0


def test_a_negative_length_is_none() -> None:
    assert [pages_of(n) for n in (-2_000_000_000, -65, -64, -1, 0, 1)] == [0, 0, 0, 0, 0, 1]


def test_parts_and_buffers() -> None:
    assert [num_parts(num_sms, tiles) for num_sms, tiles in ((132, 1), (132, 2), (132, 5), (7, 8))] == [132, 66, 26, 1]
    assert (max_splits(132), max_items(10, 132), max_items(1000, 132)) == (792, 792, 1000)
    piece = Piece(request=0, number=0, begin=2, end=5)
    assert max(loads([[piece], [piece, piece], []], CostModel())) == 2 * (2400 + 3 * 1400)


def check(seq_lens: list[int], row_tiles: int, num_sms: int, schedule: Schedule) -> None:
    parts = num_parts(num_sms, row_tiles)
    assert len(schedule.parts) == parts
    items = [item for part in schedule.parts for item in part]
    assert len(items) <= max_items(len(seq_lens), parts)
    assert schedule.split_offsets[-1] <= max_splits(parts)

    by_request: dict[int, list] = {r: [] for r in range(len(seq_lens))}
    for item in items:
        by_request[item.request].append(item)
    assert len(schedule.split_offsets) == len(seq_lens) + 1 and schedule.split_offsets[0] == 0
    for request, length in enumerate(seq_lens):
        pieces = sorted(by_request[request], key=lambda i: i.page_begin)
        # every (request, page) exactly once: pieces are contiguous from page 0 to the last
        assert pieces[0].page_begin == 0 and pieces[-1].page_end == pages_of(length)
        assert all(a.page_end == b.page_begin for a, b in pairwise(pieces))
        slots = range(schedule.split_offsets[request], schedule.split_offsets[request + 1])
        if len(pieces) == 1:
            assert pieces[0].split == -1 and len(slots) == 0
        else:
            assert [piece.split for piece in pieces] == list(slots)
            sizes = [piece.page_end - piece.page_begin for piece in pieces]
            assert min(sizes) >= 1

    cost = CostModel()
    loads = schedule.loads()
    dearest = max((cost.of_item(i.page_end - i.page_begin) for i in items), default=0)
    assert max(loads) <= sum(loads) / parts + dearest


@settings(max_examples=3000, deadline=None)
@given(lengths, tiles, sms)
def test_every_page_exactly_once_and_balanced(seq_lens: list[int], row_tiles: int, num_sms: int) -> None:
    check(seq_lens, row_tiles, num_sms, make_schedule(seq_lens, row_tiles, num_sms))


@settings(max_examples=100, deadline=None)
@given(lengths, tiles, sms)
def test_same_input_same_plan(seq_lens: list[int], row_tiles: int, num_sms: int) -> None:
    assert make_schedule(seq_lens, row_tiles, num_sms) == make_schedule(list(seq_lens), row_tiles, num_sms)


@pytest.mark.parametrize(
    "seq_lens",
    [[], [0], [1], [64], [65], [1_048_576], [0] * 300, [1] * 4096, [1_048_576] + [1] * 131, [0, 1_000_000, 0]],
)
def test_edges(seq_lens: list[int]) -> None:
    for row_tiles in (1, 2, 132, 133):
        check(seq_lens, row_tiles, 132, make_schedule(seq_lens, row_tiles, 132))


def test_one_long_request_uses_every_part() -> None:
    loads = make_schedule([132 * 64 * 8], row_tiles=1, num_sms=132).loads()
    assert min(loads) == max(loads)


def test_uniform_batch_that_fills_the_machine_is_not_split() -> None:
    schedule = make_schedule([1024] * 132, row_tiles=1, num_sms=132)
    assert schedule.split_offsets[-1] == 0 and all(len(part) == 1 for part in schedule.parts)


def test_parts_that_wait_for_memory_are_not_cut_for_balance() -> None:
    """128 parts of 132 read as fast as 132 would: what a cut costs is paid for nothing."""
    assert make_schedule([8192] * 128, row_tiles=1, num_sms=132).split_offsets[-1] == 0


def test_ragged_batch_stays_near_the_mean() -> None:
    """128 requests of 200 .. 8000 tokens, in parts that compute: the busiest one within 3 % of the mean."""
    seq_lens = [200 + 61 * ((37 * i) % 128) for i in range(128)]
    for row_tiles in (2, 4):
        loads = make_schedule(seq_lens, row_tiles, 132).loads()
        assert max(loads) <= 1.03 * sum(loads) / len(loads)


@settings(max_examples=1000, deadline=None)
@given(lengths, tiles, sms)
def test_level_parts_differ_by_a_page_and_an_item(seq_lens: list[int], row_tiles: int, num_sms: int) -> None:
    """Each boundary moves by less than a page and an item, and a part may pay for the rest of a cut request's item."""
    cost, parts = CostModel(), num_parts(num_sms, row_tiles)
    pages = [pages_of(n) for n in seq_lens]
    hands = level(pages, parts, cost)
    if hands is None:
        return
    assert [(p.request, p.begin) for hand in hands for p in hand] == sorted(
        (p.request, p.begin) for hand in hands for p in hand
    )
    share = sum(cost.of_item(n) for n in pages) / parts
    assert max(loads(hands, cost)) <= share + 2 * cost.item + cost.page


TINY = CostModel(page=3, item=1)  # a share must pay for an item and a page, 4


@pytest.mark.parametrize("pages, parts, wanted", [([2], 2, True), ([1, 1], 3, False), ([1], 2, False)])
def test_level_needs_a_share_of_a_page(pages: list[int], parts: int, wanted: bool) -> None:
    """Shares of 4, 3 and 2."""
    assert (level(pages, parts, TINY) is not None) == wanted


@pytest.mark.parametrize("requests, wanted", [(10, True), (11, False)])
def test_level_makes_no_more_pieces_than_there_is_room_for(requests: int, wanted: bool) -> None:
    """As many as requests, and one for each of the two parts."""
    assert (level([100] * requests, 2, TINY) is not None) == wanted


@pytest.mark.parametrize(
    "item, page, pages, parts, cuts",
    [
        (0, 2, [16], 4, [(0, 4), (0, 8), (0, 12)]),  # shares of 8
        (1, 2, [16], 4, [(0, 4), (0, 8), (0, 13)]),  # shares of 9, an item before the first page
        (0, 10, [6, 2], 4, [(0, 2), (0, 4), (1, 0)]),  # the end of a request is the begin of the next
        (0, 10, [5, 7], 4, [(0, 3), (1, 1), (1, 4)]),  # a piece of one page
    ],
)
def test_known_cuts(item: int, page: int, pages: list[int], parts: int, cuts: list[tuple[int, int]]) -> None:
    hands = level(pages, parts, CostModel(page=page, item=item))
    assert hands is not None
    assert [(hand[0].request, hand[0].begin) for hand in hands] == [(0, 0), *cuts]


@settings(max_examples=300, deadline=None)
@given(st.lists(st.integers(0, 60), max_size=40), st.integers(1, 12), st.sampled_from([None, 64, 128]))
@example([3] * ROUNDS, 1, None)
@example([3] * MAX_ROUNDS, 1, 128)
def test_caps_are_the_smallest_that_keep_to_the_rounds(pages: list[int], parts: int, most: int | None) -> None:
    longest = max([*pages, 1])
    caps = [longest]
    by_mean = most is None and len(pages) + parts <= MAX_ROUNDS * parts
    for rounds in range(1, (ROUNDS if by_mean else MAX_ROUNDS) + 1):
        caps += [cap for cap in range(1, longest + 1) if len(cut(pages, cap, most)) <= rounds * parts][:1]
    assert candidate_caps(pages, parts, most)[: len(caps)] == caps


@pytest.mark.parametrize(
    "pages, parts, caps",
    [
        ([8, 40, 16], 4, [16, 20, 24]),  # a mean of 16
        ([9, 40, 16], 4, [17, 21, 25]),  # one page more
        ([16, 16], 4, [8, 10, 12]),
        ([10], 1, [10, 10, 10]),  # never more than the longest
        ([0, 0], 3, [1, 1, 1]),
        ([1, 3], 8, [1, 1, 1]),  # a mean of half a page
        ([1] * 10, 2, [1, 1, 1]),
    ],
)
def test_caps_by_the_mean(pages: list[int], parts: int, caps: list[int]) -> None:
    rounds = sum(len(pages) <= m * parts for m in range(1, ROUNDS + 1))
    assert candidate_caps(pages, parts)[1 + rounds :] == caps
    rounds = sum(len(pages) <= m * parts for m in range(1, MAX_ROUNDS + 1))
    assert len(candidate_caps(pages, parts, most=128)) == 1 + rounds  # batch-invariant mode has none
    assert len(candidate_caps([8], 1)) == 7  # with level as many as the device has thread blocks for
    assert candidate_caps([1] * 11 + [9], 2) == [9, 9]  # no room for two cuts more, but for six pieces a part


def test_a_long_request_is_cut_in_any_batch_that_leaves_room() -> None:
    """90 requests on 16 parts: too many for a cut at every part's end, but not for six pieces a part."""
    for batch in (70, 80, 90):
        loads = make_schedule([65536] + [4096] * (batch - 1), row_tiles=8, num_sms=132).loads()
        assert max(loads) < 1.3 * sum(loads) / len(loads), batch


@settings(max_examples=300, deadline=None)
@given(st.lists(st.integers(0, 60), max_size=40), st.integers(1, 12))
def test_caps_by_the_mean_leave_room(pages: list[int], parts: int) -> None:
    for cap in candidate_caps(pages, parts)[1:]:
        assert len(cut(pages, cap)) <= max_items(len(pages), parts)


def test_a_short_ragged_batch_has_few_cuts() -> None:
    """Four of sixteen requests would hold up the rest: they are cut, not one at every boundary between parts."""
    schedule = make_schedule([64 * 16] * 12 + [64 * 32] * 4, row_tiles=1, num_sms=20, rows=64)
    assert schedule.split_offsets[-1] == 8


@pytest.mark.parametrize("most", [1, 64, 128])
def test_a_single_leaf_is_never_cut(most: int) -> None:
    single = [pages for pages in range(40) if leaf_count(pages, most) == 1]
    assert len(single) > 4
    assert all(piece_count(pages, cap, most) == 1 for pages in single for cap in range(1, 40))


def test_row_tiles() -> None:
    assert [row_tiles_of(rows, 1) for rows in (1, 64, 65, 128, 256)] == [1, 1, 2, 2, 4]
    assert row_tiles_of(65, 2) == 4


@settings(max_examples=200, deadline=None)
@given(lengths, tiles, sms)
def test_operator_holds_the_specification(seq_lens: list[int], row_tiles: int, num_sms: int) -> None:
    made = make_schedule(seq_lens, row_tiles, num_sms)
    items, part_offsets, split_offsets = ops.schedule(
        torch.tensor(seq_lens, dtype=torch.int32), row_tiles, num_sms, 64 * row_tiles
    )
    offsets = part_offsets.tolist()
    assert items.dtype == part_offsets.dtype == split_offsets.dtype == torch.int32
    assert items.shape == (max_items(len(seq_lens), len(made.parts)), 4)
    assert [items[a:b].tolist() for a, b in pairwise(offsets)] == [[list(item) for item in part] for part in made.parts]
    assert (items[offsets[-1] :] == -1).all()
    assert tuple(split_offsets.tolist()) == made.split_offsets
