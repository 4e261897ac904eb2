"""Requests with different numbers of query tokens on the Hopper kernels."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import pytest
import torch

import flashmla_backend
from tests.kernels.problems import DTYPES, SCALE, Problem, fault, make_problem, oracle

Record = Callable[[str, object], None]

COUNTS = {
    "drafts": [1, 4, 2, 1, 3, 4, 1, 2],
    "a prompt beside decodes": [1, 1, 1, 100, 1, 1, 0, 1],
    "prompts": [33, 64, 17, 5, 128, 63, 65, 1],
}
LENGTHS = {
    "short": [1, 64, 65, 130, 40, 300, 0, 7],  # some hold fewer tokens than they have queries
    "ragged": [9000, 64, 700, 130, 4096, 3000, 0, 2500],  # some are cut
    "even": [4096] * 8,
}


def ragged_queries(problem: Problem, counts: list[int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The last of each request's query tokens, [T, H_q, 576]; their offsets; and which they are, [B, S_q]."""
    s_q = problem.q.shape[1]
    chosen = torch.arange(s_q) >= s_q - torch.tensor(counts)[:, None]
    return problem.q[chosen.cuda()], torch.tensor([0, *counts]).cumsum(0).int(), chosen.cuda()


def decode(problem: Problem, q: torch.Tensor, offsets: torch.Tensor, causal: bool) -> tuple[torch.Tensor, torch.Tensor]:
    plan = flashmla_backend.plan_ragged_decode(
        problem.seq_lens,
        problem.block_table,
        offsets,
        h_q=q.shape[1],
        h_kv=problem.kv_cache.shape[2],
        page_size=problem.kv_cache.shape[1],
        causal=causal,
        num_pages=problem.kv_cache.shape[0],
    )
    return flashmla_backend.mla_decode(q, problem.kv_cache, plan, softmax_scale=SCALE)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("h_q, h_kv", [(1, 1), (3, 1), (8, 1), (16, 1), (20, 2), (63, 1), (64, 1), (126, 1), (128, 1)])
def test_grid(h_q: int, h_kv: int, dtype: torch.dtype, record_property: Record) -> None:
    cases, faults = 0, {}
    for page_size in (64, 16):
        for counts_name, counts in COUNTS.items():
            for lengths_name, lengths in LENGTHS.items():
                options = {"s_q": max(counts), "h_q": h_q, "h_kv": h_kv, "dtype": dtype, "page_size": page_size}
                problem = make_problem(lengths, **options)  # type: ignore[arg-type]
                q, offsets, chosen = ragged_queries(problem, counts)
                for causal in (True, False):
                    expected = [x[chosen] for x in oracle(problem, causal=causal)]
                    cases += 1
                    if found := fault(*decode(problem, q, offsets, causal), *expected):
                        faults[page_size, counts_name, lengths_name, causal] = found
    record_property("cases", cases)
    assert not faults


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("h_q, s_q", [(16, 1), (16, 4), (20, 3), (128, 1)])
def test_the_same_bits_as_a_uniform_step(h_q: int, s_q: int, dtype: torch.dtype) -> None:
    """Of requests that are one query tile each, so that both are cut alike."""
    problem = make_problem(LENGTHS["ragged"], s_q=s_q, h_q=h_q, dtype=dtype)
    uniform = flashmla_backend.plan_decode(problem.seq_lens, problem.block_table, s_q=s_q, h_q=h_q)
    expected = flashmla_backend.mla_decode(problem.q, problem.kv_cache, uniform, softmax_scale=SCALE)
    found = decode(problem, problem.q.flatten(0, 1), torch.arange(9, dtype=torch.int32) * s_q, True)
    assert all(torch.equal(x, y.flatten(0, 1)) for x, y in zip(found, expected, strict=True))


@pytest.mark.parametrize("h_q", [8, 16, 128])
@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
def test_queries_of_others_change_no_bit(counts: list[int], h_q: int, record_property: Record) -> None:
    """Row tiles hold nothing of other requests, though theirs are in the same slots before."""
    problem = make_problem(LENGTHS["ragged"], s_q=max(counts), h_q=h_q)
    q, offsets, _ = ragged_queries(problem, counts)
    expected = decode(problem, q, offsets, True)
    record_property("cases", len(counts))
    for first, last in pairwise(offsets.tolist()):
        poisoned = torch.full_like(q, float("nan"))
        poisoned[first:last] = q[first:last]
        for ours, theirs in zip(decode(problem, poisoned, offsets, True), expected, strict=True):
            assert torch.equal(ours[first:last], theirs[first:last])


def test_parts_of_q_may_lie_apart() -> None:
    problem = make_problem(LENGTHS["ragged"], s_q=4, h_q=16)
    q, offsets, _ = ragged_queries(problem, COUNTS["drafts"])
    plan = flashmla_backend.plan_ragged_decode(problem.seq_lens, problem.block_table, offsets, h_q=16)
    by_head = q[..., :512].transpose(0, 1).contiguous().transpose(0, 1)
    apart = flashmla_backend.mla_decode((by_head, q[..., 512:].clone()), problem.kv_cache, plan, softmax_scale=SCALE)
    assert all(map(torch.equal, apart, decode(problem, q, offsets, True)))


def test_more_tokens_than_the_scheduler_takes_tiles() -> None:
    """A prompt of 9,000 tokens with 128 heads: two tokens a tile, four row tiles."""
    problem = make_problem([9000, 64], h_q=128)
    counts = [9000, 1]
    q = torch.randn(9001, 128, 576, device="cuda", generator=torch.Generator("cuda").manual_seed(1)).bfloat16()
    out, lse = decode(problem, q, torch.tensor([0, *counts]).cumsum(0).int(), True)
    for token in (0, 1, 62, 63, 64, 4095, 8191, 8999):
        alone = Problem(
            q[None, token, None],
            problem.kv_cache,
            problem.block_table[:1],
            problem.seq_lens[:1] * 0 + token + 1,
            problem.tokens[:1, : token + 1],
        )
        expected_out, expected_lse = oracle(alone, causal=True)
        assert fault(out[None, token, None], lse[None, token, None], expected_out, expected_lse) is None
