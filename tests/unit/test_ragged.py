"""Requests with different numbers of query tokens, against each of them alone."""

from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import flashmla_backend
from flashmla_backend import InvalidArgument, OutOfBounds, Unsupported, plan_ragged_decode, ragged, reference
from flashmla_backend.ragged import MOST_TILES, QueryTiles, queries_per_tile
from tests.conftest import SCALE, Problem, check_close, make_problem

COUNTS = [1, 0, 7, 3, 70, 1, 5, 2]
LENGTHS = [300, 64, 7, 130, 700, 0, 1, 900]  # of them two that hold fewer tokens than they have queries


def offsets_of(counts: list[int]) -> torch.Tensor:
    return torch.tensor([0, *counts]).cumsum(0).int()


def ragged_problem(h_q: int, h_kv: int = 1, page_size: int = 64) -> tuple[Problem, torch.Tensor]:
    """With q [T, H_q, 576]."""
    problem = make_problem(LENGTHS, h_q=h_q, h_kv=h_kv, page_size=page_size)
    problem.q = torch.randn(sum(COUNTS), h_q, 576, generator=torch.Generator().manual_seed(1)).bfloat16()
    return problem, offsets_of(COUNTS)


@given(
    counts=st.lists(st.integers(0, 40), min_size=1, max_size=12),
    group=st.sampled_from([1, 3, 16, 20, 63, 64, 65, 128]),
)
def test_tiles_hold_every_query_token_once(counts: list[int], group: int) -> None:
    offsets = offsets_of(counts)
    s_q = queries_per_tile(offsets, group)
    tiles = QueryTiles.of(offsets, s_q)
    assert s_q == 1 or s_q * group <= 64
    assert tiles.offsets[0] == 0 and tiles.offsets[-1] == offsets[-1]
    sizes = tiles.offsets.diff()
    assert all(1 <= size <= s_q for size in sizes)
    for request, (first, last) in enumerate(pairwise(offsets.tolist())):
        own = tiles.request == request
        assert sizes[own].sum() == last - first
        # A tile's last query token sees the cache but for the request's later query tokens.
        assert (tiles.offsets[1:][own] + tiles.behind[own] == last).all()


def test_tiles_are_no_larger_than_any_request_needs() -> None:
    counts: list[list[int]] = [[], [0], [1, 1], [1, 3], [17, 1]]
    assert [queries_per_tile(offsets_of(each), 4) for each in counts] == [1, 1, 1, 3, 16]


def test_more_tiles_than_the_scheduler_takes_are_made_larger() -> None:
    assert [queries_per_tile(offsets_of([n]), 128) for n in (MOST_TILES, MOST_TILES + 1, 4 * MOST_TILES)] == [1, 2, 4]


def test_the_scheduler_takes_so_many_tiles() -> None:
    header = Path(__file__).parents[2] / "kernels" / "include" / "flashmla" / "schedule.h"
    found = re.search(r"FLASHMLA_SCHEDULE_MAX_BATCH = (\d+)", header.read_text())
    assert found and int(found[1]) == MOST_TILES


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("page_size", [16, 64, 256])
@pytest.mark.parametrize("h_q, h_kv", [(16, 1), (1, 1), (20, 2), (126, 1)])
def test_as_each_request_alone(h_q: int, h_kv: int, page_size: int, causal: bool) -> None:
    problem, offsets = ragged_problem(h_q, h_kv, page_size)
    plan = plan_ragged_decode(
        problem.seq_lens,
        problem.block_table,
        offsets,
        h_q=h_q,
        h_kv=h_kv,
        page_size=page_size,
        causal=causal,
        num_sms=200,
    )
    assert (plan.seq_lens >= 0).all() and len(plan.part_offsets) - 1 == 200 // (h_kv * (1 + (h_q > 64)))
    assert plan.split_offsets[-1] > 0 or h_q == 126
    out, lse = flashmla_backend.mla_decode(problem.q, problem.kv_cache, plan, softmax_scale=SCALE)
    assert out.shape == (*problem.q.shape[:2], 512) and lse.shape == problem.q.shape[:2]
    for request, (first, last) in enumerate(pairwise(offsets.tolist())):
        if first == last:
            continue
        expected = reference.mla_decode(
            problem.q[None, first:last],
            problem.kv_cache,
            problem.block_table[request, None],
            problem.seq_lens[request, None],
            softmax_scale=SCALE,
            causal=causal,
        )
        check_close(out[None, first:last], lse[None, first:last], *expected)


def test_defaults_are_those_of_plan_decode() -> None:
    problem, offsets = ragged_problem(16)
    plan = plan_ragged_decode(problem.seq_lens, problem.block_table, offsets, h_q=16)
    uniform = flashmla_backend.plan_decode(problem.seq_lens, problem.block_table, s_q=1, h_q=16)
    for name in ("h_q", "h_kv", "page_size", "causal", "max_leaves", "bounds"):
        assert getattr(plan, name) == getattr(uniform, name)
    assert plan.part_offsets.shape == uniform.part_offsets.shape
    assert "26 query tiles, 89 query tokens, 16 heads over 1 KV heads, pages of 64, causal" in str(plan)


def test_parts_of_q_may_lie_apart() -> None:
    problem, offsets = ragged_problem(16)
    plan = plan_ragged_decode(problem.seq_lens, problem.block_table, offsets, h_q=16)
    parts = problem.q[..., :512].transpose(0, 1).contiguous().transpose(0, 1), problem.q[..., 512:].clone()
    together = flashmla_backend.mla_decode(problem.q, problem.kv_cache, plan, softmax_scale=SCALE)
    apart = flashmla_backend.mla_decode(parts, problem.kv_cache, plan, softmax_scale=SCALE)
    assert all(map(torch.equal, together, apart))


def test_a_step_without_queries() -> None:
    problem, _ = ragged_problem(16)
    plan = plan_ragged_decode(problem.seq_lens, problem.block_table, offsets_of([0] * len(COUNTS)), h_q=16)
    out, lse = flashmla_backend.mla_decode(problem.q[:0], problem.kv_cache, plan, softmax_scale=SCALE)
    assert out.shape == (0, 16, 512) and lse.shape == (0, 16)


def test_faults_name_the_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLASHMLA_CHECK_BOUNDS", "1")
    problem, offsets = ragged_problem(16)
    pages = problem.kv_cache.shape[0]
    problem.block_table[4, 2] = pages
    plan = plan_ragged_decode(problem.seq_lens, problem.block_table, offsets, h_q=16, num_pages=pages)
    out, lse = flashmla_backend.mla_decode(problem.q, problem.kv_cache, plan, softmax_scale=SCALE)
    at_fault = slice(*offsets[4:6].tolist())
    assert (out[at_fault] == 0).all() and (lse[at_fault] == float("-inf")).all()
    assert lse[: offsets[4]].isfinite().any()
    with pytest.raises(InvalidArgument, match=r"kv_cache has .* pages, and the plan's table was checked for"):
        flashmla_backend.mla_decode(problem.q, problem.kv_cache[1:], plan, softmax_scale=SCALE)
    with pytest.raises(OutOfBounds, match=rf"block_table\[4, 2\] was {pages}"):
        plan.check()
    plan_ragged_decode(problem.seq_lens, problem.block_table, offsets, h_q=16, num_pages=pages)
    with pytest.raises(OutOfBounds, match=rf"block_table\[4, 2\] was {pages}"):
        plan_ragged_decode(problem.seq_lens, problem.block_table, offsets, h_q=16, num_pages=pages)


@pytest.mark.parametrize(
    "offsets, message",
    [
        (torch.zeros(3, dtype=torch.int32), r"query_offsets is \[3\] int32 for 8 requests; accepted: \[9\] int32"),
        (torch.zeros(9, dtype=torch.int64), r"query_offsets is \[9\] int64 for 8 requests; accepted: \[9\] int32"),
        (torch.arange(1, 10).int(), r"query_offsets is \[1, 2, .*\]; accepted: from 0 on, no offset less than the one"),
        (torch.tensor([0, 1, 2, 1, 4, 5, 6, 7, 8]).int(), r"query_offsets is \[0, 1, 2, 1, .*\]; accepted: from 0 on"),
        (torch.zeros(9, dtype=torch.int32, device="meta"), r"query_offsets is on meta; accepted: the CPU"),
    ],
)
def test_wrong_offsets_are_refused(offsets: torch.Tensor, message: str) -> None:
    problem, _ = ragged_problem(16)
    with pytest.raises(InvalidArgument, match=message):
        plan_ragged_decode(problem.seq_lens, problem.block_table, offsets, h_q=16)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"h_q": 0}, "h_q is 0; accepted: an integer of at least 1"),
        ({"h_q": 16, "h_kv": 3}, "h_q is 16, h_kv 3; accepted: h_q a multiple of h_kv"),
        ({"h_q": 16, "num_sms": 0}, "num_sms is 0; accepted: an integer of at least 1"),
        ({"h_q": 16, "page_size": 8}, "page_size is 8; accepted: 16, 32, 64, 128, 256 tokens"),
    ],
)
def test_wrong_shapes_are_refused(options: dict[str, int], message: str) -> None:
    problem, offsets = ragged_problem(16)
    with pytest.raises(InvalidArgument, match=message):
        plan_ragged_decode(problem.seq_lens, problem.block_table, offsets, **options)


def test_wrong_queries_are_refused() -> None:
    problem, offsets = ragged_problem(16)
    plan = plan_ragged_decode(problem.seq_lens, problem.block_table, offsets, h_q=16)
    with pytest.raises(InvalidArgument, match=r"q is \[89, 1, 16, 576\] bfloat16; accepted: \[T, H_q, 576\]"):
        flashmla_backend.mla_decode(problem.q[:, None], problem.kv_cache, plan, softmax_scale=SCALE)
    with pytest.raises(InvalidArgument, match=r"made for other shapes; accepted: \[89, 16, 576\]"):
        flashmla_backend.mla_decode(problem.q[1:], problem.kv_cache, plan, softmax_scale=SCALE)


def test_flashinfer_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ragged, "path_of", lambda device: "flashinfer")
    problem, offsets = ragged_problem(16)
    with pytest.raises(Unsupported, match=r"query_offsets was given: FlashInfer serves cpu.*by plan_decode"):
        plan_ragged_decode(problem.seq_lens, problem.block_table, offsets, h_q=16)
