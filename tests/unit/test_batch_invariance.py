"""Batch-invariant mode on the CPU: a request's bits do not depend on what shares its batch; and its schedules."""

from __future__ import annotations

from functools import partial
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import flashmla_backend
from flashmla_backend import InvalidArgument, Unsupported, api, reference, workspace
from flashmla_backend.leaves import (
    MAX_LEAVES,
    MIN_LEAF_PAGES,
    MIN_SHARED_LEAF_PAGES,
    ROOM_FLOATS,
    leaf_count,
    leaves_of,
    max_leaves,
    room_floats,
)
from flashmla_backend.schedule import make_schedule, max_items, max_splits, num_parts, pages_of
from tests import conftest
from tests.conftest import SCALE, Problem, check_close, make_problem

lengths = st.one_of(
    st.lists(st.integers(0, 5000), max_size=80),
    st.lists(st.integers(0, 1_048_576), max_size=12),
    st.lists(st.sampled_from([0, 1, 63, 64, 65, 447, 448, 449, 511, 512, 513, 4096, 100_000]), max_size=100),
)
tiles = st.sampled_from([1, 2, 3, 4, 8, 16, 200])
sms = st.sampled_from([1, 2, 7, 78, 132])


decode = partial(conftest.decode, batch_invariant=True, num_sms=12)


def select(problem: Problem, requests: list[int], seed: int) -> Problem:
    """These requests, -1 for one of length 0, their pages elsewhere in another cache and everything else poison."""
    generator = torch.Generator().manual_seed(seed)
    page_size = problem.kv_cache.shape[1]
    cache = torch.full_like(problem.kv_cache, float("nan"))
    ids = torch.randperm(len(cache), generator=generator)
    seq_lens = torch.tensor([0 if r < 0 else int(problem.seq_lens[r]) for r in requests], dtype=torch.int32)
    table = torch.full((len(requests), problem.block_table.shape[1] + 3), -7, dtype=torch.int32)
    first = 0
    for row, r in enumerate(requests):
        pages = -(-int(seq_lens[row]) // page_size)
        own = ids[first : first + pages]
        first += pages
        table[row, :pages] = own.int()
        cache[own] = problem.kv_cache[problem.block_table[r, :pages].long()]
    return Problem(problem.q[requests], cache, table, seq_lens)


@settings(max_examples=40, deadline=None)
@given(
    lens=st.lists(
        st.one_of(st.integers(0, 3000), st.sampled_from([0, 1, 64, 447, 448, 449, 512, 513])), min_size=1, max_size=6
    ),
    s_q=st.integers(1, 3),
    h_kv=st.sampled_from([1, 2]),
    page_size=st.sampled_from([16, 64, 128]),
    dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
    order=st.randoms(use_true_random=False),
)
def test_bits_do_not_depend_on_the_batch(lens: list, s_q: int, h_kv: int, page_size: int, dtype, order) -> None:
    problem = make_problem(lens, s_q=s_q, h_q=6, h_kv=h_kv, page_size=page_size, dtype=dtype)
    out, lse = decode(problem)
    tensors = problem.q, problem.kv_cache, problem.block_table, problem.seq_lens
    check_close(out, lse, *reference.mla_decode(*tensors, softmax_scale=SCALE))

    everyone = list(range(len(lens)))
    padded = [*everyone, -1, -1]  # as graphs pad
    order.shuffle(padded)
    for requests in ([r] for r in everyone), [padded], [order.sample(everyone, len(everyone) // 2 + 1)]:
        for chosen in requests:
            some_out, some_lse = decode(select(problem, chosen, seed=len(chosen)), num_sms=order.choice([1, 7, 132]))
            for row, r in enumerate(chosen):
                if r >= 0:
                    assert torch.equal(some_out[row], out[r]) and torch.equal(some_lse[row], lse[r]), (chosen, r)


@settings(max_examples=1000, deadline=None)
@given(lengths, tiles, sms)
def test_schedules_cut_into_subtrees(seq_lens: list[int], row_tiles: int, num_sms: int) -> None:
    made = make_schedule(seq_lens, row_tiles, num_sms, batch_invariant=True)
    parts, most = num_parts(num_sms, row_tiles), max_leaves(row_tiles)
    items = [item for part in made.parts for item in part]
    assert len(items) <= max_items(len(seq_lens), parts)
    assert made.split_offsets[-1] <= max_splits(parts)
    for request, length in enumerate(seq_lens):
        pages = pages_of(length)
        own = sorted((i for i in items if i.request == request), key=lambda i: i.page_begin)
        assert own[0].page_begin == 0 and own[-1].page_end == pages
        assert all(a.page_end == b.page_begin for a, b in pairwise(own))
        slots = list(range(made.split_offsets[request], made.split_offsets[request + 1]))
        assert [i.split for i in own] == (slots or [-1])
        # The same leaves however the request is cut, and as many in each of a power of two of items: subtrees.
        held = [leaves_of(pages, i.page_begin, i.page_end, most) for i in own]
        assert [leaf for some in held for leaf in some] == leaves_of(pages, 0, pages, most)
        assert len({len(some) for some in held}) == 1 and len(own).bit_count() == 1


@pytest.mark.parametrize("most", [1, 2, 16, 64, 128])
def test_leaves_are_near_equal_and_not_small(most: int) -> None:
    for pages in [*range(300), 10_000, 2**25]:
        leaves = leaves_of(pages, 0, pages, most)
        sizes = [end - begin for begin, end in leaves]
        assert sum(sizes) == pages and len(leaves) == leaf_count(pages, most) <= most
        assert max(sizes) - min(sizes) <= 1
        smallest, root = (MIN_LEAF_PAGES, 2) if most == MAX_LEAVES else (MIN_SHARED_LEAF_PAGES, 1)
        assert len(leaves) == 1 or min(sizes) >= smallest
        assert len(leaves) == most or max(sizes) <= 2 * smallest or root**2 * pages <= len(leaves) ** 2


def test_a_long_request_alone_is_shared_by_all_parts() -> None:
    for tokens, leaves in ((1024 * 64, MAX_LEAVES // 2), (1024 * 64 + 1, MAX_LEAVES)):
        loads = make_schedule([tokens], row_tiles=1, num_sms=132, batch_invariant=True).loads()
        assert sum(load > 0 for load in loads) == leaves


def test_the_mode_must_be_that_of_the_reused_plan() -> None:
    problem = make_problem([1000, 3, 0], h_q=8)
    plan = flashmla_backend.plan_decode(problem.seq_lens, problem.block_table, s_q=1, h_q=8, batch_invariant=True)
    assert plan.max_leaves == MAX_LEAVES
    again = flashmla_backend.plan_decode(
        problem.seq_lens, problem.block_table, s_q=1, h_q=8, batch_invariant=True, reuse=plan
    )
    assert again is plan
    with pytest.raises(InvalidArgument, match=r"reuse was made for .*'batch_invariant': True"):
        flashmla_backend.plan_decode(problem.seq_lens, problem.block_table, s_q=1, h_q=8, reuse=plan)


@pytest.mark.parametrize("s_q, h_q, h_kv", [(1, 16, 1), (1, 128, 1), (5, 128, 1), (2, 20, 2)])
def test_workspace_holds_the_rooms_of_every_thread_block(
    s_q: int, h_q: int, h_kv: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (api, workspace):
        monkeypatch.setattr(module, "path_of", lambda device: "sm90")
    problem = make_problem([70, 3], s_q=s_q, h_q=h_q, h_kv=h_kv)
    shape = {"s_q": s_q, "h_q": h_q, "h_kv": h_kv, "num_sms": 64, "batch_invariant": True}
    plan = flashmla_backend.plan_decode(problem.seq_lens, problem.block_table, **shape)
    blocks = (plan.part_offsets.shape[0] - 1) * -(-s_q * h_q // h_kv // 64) * h_kv
    assert plan.rooms.numel() == room_floats(s_q * h_q // h_kv, blocks, plan.max_leaves) > 0
    assert plan.rooms.data_ptr() % 16 == 0
    assert (plan.rooms.data_ptr() - plan.partial_out.data_ptr()) % workspace.ALIGNMENT == 0
    size = workspace.workspace_size(torch.device("cpu"), **shape)
    assert plan.partial_out.numel() + plan.rooms.numel() + plan.partial_lse.numel() == size


@pytest.mark.parametrize("rows, sixteens", [(1, 2), (16, 2), (32, 2), (33, 3), (49, 4), (64, 4), (100, 4)])
def test_few_rows_have_rooms_as_if_they_were_32(rows: int, sixteens: int) -> None:
    assert room_floats(rows, 10, MAX_LEAVES) == 10 * 7 * sixteens * ROOM_FLOATS


def test_flashinfer_has_no_such_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api, "path_of", lambda device: "flashinfer")
    problem = make_problem([70], h_q=8)
    with pytest.raises(Unsupported, match="batch_invariant is True: FlashInfer serves cpu"):
        flashmla_backend.plan_decode(problem.seq_lens, problem.block_table, s_q=1, h_q=8, batch_invariant=True)
