"""Engine pages as 64-token tiles: every page size, stride and tail."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flashmla_backend import plan_decode
from flashmla_backend.errors import InvalidArgument
from flashmla_backend.paging import (
    D_QK,
    D_V,
    PAGE_SIZES,
    check_kv_cache,
    check_lengths,
    check_page_ids,
    present_as_tiles,
)
from tests.conftest import POISON_PAGE


def numbered_cache(pages: int, page_size: int, h_kv: int, page_gap: int = 0, row_gap: int = 0) -> torch.Tensor:
    """[P, page_size, H_kv, 576] of page * page_size + row + column / 1024, with gaps after rows and pages."""
    width = h_kv * 576 + row_gap
    backing = torch.full((pages * (page_size * width + page_gap),), float("nan"))
    cache = backing.as_strided((pages, page_size, h_kv, 576), (page_size * width + page_gap, width, 576, 1))
    slot = torch.arange(pages * page_size, dtype=torch.float32).view(pages, page_size, 1, 1)
    cache.copy_((slot + torch.arange(576) / 1024).expand(pages, page_size, h_kv, 576))
    return cache


@settings(max_examples=400, deadline=None)
@given(
    page_size=st.sampled_from(PAGE_SIZES),
    length=st.integers(1, 700),
    h_kv=st.integers(1, 2),
    row_gap=st.sampled_from([0, 64]),
    gap_pages=st.integers(0, 2),
    data=st.data(),
)
def test_gather_returns_each_token_once(
    page_size: int, length: int, h_kv: int, row_gap: int, gap_pages: int, data: st.DataObject
) -> None:
    pages = -(-length // page_size)
    gap = gap_pages * 64 * (h_kv * 576 + row_gap)  # a page stride that is a multiple of 64 rows
    cache = numbered_cache(pages + 1, page_size, h_kv, gap, row_gap)
    ids = data.draw(st.permutations(range(pages + 1)))[:pages]
    table = torch.tensor([[*ids, POISON_PAGE, -7]], dtype=torch.int32)
    check_kv_cache(cache, page_size, h_kv)
    paged = present_as_tiles(cache, table)
    assert paged.runs.untyped_storage().data_ptr() == cache.untyped_storage().data_ptr(), "a copy was made"

    first = data.draw(st.integers(0, (length - 1) // 64))
    last = data.draw(st.integers(first + 1, -(-length // 64)))
    begin, end = first * 64, min(last * 64, length)
    tokens = paged.gather(0, begin, end)
    expected = [ids[t // page_size] * page_size + t % page_size for t in range(begin, end)]
    assert tokens.shape == (end - begin, h_kv, 576)
    assert tokens[:, :, 0].tolist() == [[slot] * h_kv for slot in expected]
    assert tokens[:, :, 575].tolist() == [[slot + 575 / 1024] * h_kv for slot in expected]


@pytest.mark.parametrize("page_size", PAGE_SIZES)
def test_gather_beyond_two_gigaelements(page_size: int) -> None:
    """Page x stride passes 2^31 elements; the backing memory is never touched but for one page."""
    stride = 64 * 576 * 60_000
    backing = torch.empty(stride + page_size * 576, dtype=torch.float16)  # 4.4 GB of address space, two pages of memory
    cache = backing.as_strided((2, page_size, 1, 576), (stride, 576, 576, 1))
    assert stride > 2**31
    cache[1].copy_(torch.arange(page_size, dtype=torch.float16)[:, None, None].expand(page_size, 1, 576))
    paged = present_as_tiles(cache, torch.tensor([[1]], dtype=torch.int32))
    assert paged.gather(0, 0, page_size)[:, 0, 3].tolist() == list(range(page_size))


def test_page_ids_are_checked_only_where_they_are_used() -> None:
    table = torch.tensor([[0, 5, POISON_PAGE], [-1, POISON_PAGE, POISON_PAGE]], dtype=torch.int32)
    lengths = torch.tensor([128, 0], dtype=torch.int32)
    check_page_ids(table, lengths, 64, 6)
    with pytest.raises(InvalidArgument, match=r"block_table\[0, 1\] is 5; accepted: 0 to 4"):
        check_page_ids(table, lengths, 64, 5)
    with pytest.raises(InvalidArgument, match=r"block_table\[1, 0\] is -1"):
        check_page_ids(table, torch.tensor([128, 1], dtype=torch.int32), 64, 6)
    with pytest.raises(InvalidArgument, match=r"block_table\[0, 1\] is 5"):  # the first of two
        check_page_ids(table, torch.tensor([128, 1], dtype=torch.int32), 64, 5)


def test_wide_pages_need_a_stride_of_whole_tiles() -> None:
    cache = numbered_cache(2, 128, 1, page_gap=576)
    with pytest.raises(InvalidArgument, match="kv_cache has a page stride"):
        check_kv_cache(cache, 128, 1)
    check_kv_cache(cache[:1], 128, 1)  # a single page has no next one


def test_pages_of_one_tile_may_lie_at_any_distance() -> None:
    cache = numbered_cache(3, 64, 1, page_gap=576)
    check_kv_cache(cache, 64, 1)
    tokens = present_as_tiles(cache, torch.tensor([[2, 0]], dtype=torch.int32)).gather(0, 0, 128)
    assert tokens[:, 0, 0].tolist() == [*range(128, 192), *range(64)]


def test_a_single_page_may_repeat_one_row() -> None:
    cache = numbered_cache(1, 128, 1)[:, 5:6].expand(1, 128, 1, 576)  # a row stride of 0: no next page, no distance
    check_kv_cache(cache, 128, 1)
    tokens = present_as_tiles(cache, torch.tensor([[0]], dtype=torch.int32)).gather(0, 0, 128)
    assert tokens[:, 0, 0].tolist() == [5] * 128


def test_the_width_of_a_row_is_the_kernels() -> None:
    header = (Path(__file__).parents[2] / "kernels" / "tools" / "decode_problem.h").read_text()
    assert (f"kLatent = {D_V}" in header, f"kWidth = {D_QK}" in header) == (True, True)


def test_lengths_on_other_devices_are_not_looked_at() -> None:
    check_lengths(TABLE.to("meta"), ints(1, 2).to("meta"), 64)


def ints(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


TABLE = torch.zeros(2, 3, dtype=torch.int32)  # three pages of 64 tokens a request


@pytest.mark.parametrize(
    "block_table, seq_lens",
    [
        (TABLE, ints(0, 3 * 64)),  # full
        (TABLE[:1], ints(5, 6, 7)[1:2]),
        (TABLE[:1], ints(5, 6, 7, 8)[::3][:1]),  # the stride of one element means nothing
        (TABLE[:0], ints()),
        (torch.zeros(0, 2, dtype=torch.int32).t(), ints(0, 0)),  # no entries, whatever the strides
    ],
)
def test_what_can_be_followed_is_accepted(block_table: torch.Tensor, seq_lens: torch.Tensor) -> None:
    plan_decode(seq_lens, block_table, s_q=1, h_q=4)


@pytest.mark.parametrize(
    "block_table, seq_lens, message",
    [
        (TABLE, ints(0, 3 * 64 + 1), "3 pages of 64 tokens wide, too narrow for a request of 193 .* at least 4 pages"),
        (TABLE[:1], ints(200), "too narrow for a request of 200"),
        (TABLE, ints(-1, 4), "seq_lens contains -1"),
        (TABLE, ints(1, 2)[:, None], r"seq_lens is \[2, 1\] int32"),
        (TABLE, ints(1, 2, 3, 4)[::2], "seq_lens has strides"),
        (TABLE[:, :, None], ints(1, 2), r"block_table is \[2, 3, 1\] int32"),
        (TABLE, ints(1), "block_table has 2 rows for seq_lens of 1"),
        (torch.zeros(2, 2, dtype=torch.int32)[:, ::2], ints(1, 2), "block_table has strides"),
    ],
)
def test_what_cannot_be_followed_is_refused(block_table: torch.Tensor, seq_lens: torch.Tensor, message: str) -> None:
    with pytest.raises(InvalidArgument, match=message):
        plan_decode(seq_lens, block_table, s_q=1, h_q=4)
