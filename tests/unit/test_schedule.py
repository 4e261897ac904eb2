"""The tile scheduler: coverage, offsets, balance, determinism, over random length sets."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flashmla_backend import ops
from flashmla_backend.schedule import (
    MIN_SPLIT_PAGES,
    CostModel,
    Schedule,
    busiest,
    level,
    make_schedule,
    max_items,
    num_parts,
    pages_of,
    row_tiles_of,
)

lengths = st.one_of(
    st.lists(st.integers(0, 5000), max_size=150),
    st.lists(st.integers(0, 300), max_size=400),
    st.lists(st.integers(0, 1_048_576), max_size=12),
    st.lists(st.sampled_from([0, 1, 63, 64, 65, 127, 128, 192, 255, 256, 257, 4096]), max_size=200),
)
tiles = st.sampled_from([1, 2, 3, 4, 8, 16, 200])
sms = st.sampled_from([1, 2, 7, 78, 132])


def check(seq_lens: list[int], row_tiles: int, num_sms: int, schedule: Schedule) -> None:
    parts = num_parts(num_sms, row_tiles)
    assert len(schedule.parts) == parts
    items = [item for part in schedule.parts for item in part]
    assert len(items) <= max_items(len(seq_lens), parts)

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
        if pages_of(length) < 2 * MIN_SPLIT_PAGES:
            assert len(pieces) == 1, "a short sequence was split"

    cost = CostModel()
    loads = schedule.loads(row_tiles)
    dearest = max((cost.of_item(i.page_end - i.page_begin, row_tiles) for i in items), default=0)
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
    loads = make_schedule([132 * 64 * 8], row_tiles=1, num_sms=132).loads(1)
    assert min(loads) == max(loads)


def test_uniform_batch_that_fills_the_machine_is_not_split() -> None:
    schedule = make_schedule([1024] * 132, row_tiles=1, num_sms=132)
    assert schedule.split_offsets[-1] == 0 and all(len(part) == 1 for part in schedule.parts)


def test_ragged_batch_stays_near_the_mean() -> None:
    """128 requests of 200 .. 8000 tokens: the busiest part within 3 % of the mean."""
    seq_lens = [200 + 61 * ((37 * i) % 128) for i in range(128)]
    for row_tiles in (1, 2):
        loads = make_schedule(seq_lens, row_tiles, 132).loads(row_tiles)
        assert max(loads) <= 1.03 * sum(loads) / len(loads)


@settings(max_examples=1000, deadline=None)
@given(lengths, tiles, sms)
def test_level_parts_differ_by_two_pages_and_an_item(seq_lens: list[int], row_tiles: int, num_sms: int) -> None:
    """Each boundary moves by less than MIN_SPLIT_PAGES, and a part may pay for the rest of a cut request's item."""
    cost, parts = CostModel(), num_parts(num_sms, row_tiles)
    pages = [pages_of(n) for n in seq_lens]
    hands = level(pages, parts, row_tiles, cost)
    if hands is None:
        return
    assert [(p.request, p.begin) for hand in hands for p in hand] == sorted(
        (p.request, p.begin) for hand in hands for p in hand
    )
    page = cost.of_item(1, row_tiles) - cost.item
    share = sum(cost.of_item(n, row_tiles) for n in pages) / parts
    assert busiest(hands, row_tiles, cost) <= share + 2 * cost.item + (2 * MIN_SPLIT_PAGES + 1) * page


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
