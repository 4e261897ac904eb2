"""CPU decode against the oracle; everything a request does not own is poison (NaN rows, impossible page ids)."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import flashmla_backend
from flashmla_backend import reference
from tests.conftest import SCALE, Problem, check_close, decode, make_problem

HEADS = [(h_q, h_kv) for h_q in (1, 3, 16, 20, 63, 64, 126, 128) for h_kv in (1, 2) if h_q % h_kv == 0] + [
    (6, 2),
    (40, 2),
]
EDGE_LENGTHS = [0, 1, 2, 5, 63, 64, 65, 127, 128, 129, 200, 447, 513]


def check_against_oracle(problem: Problem, *, causal: bool, num_sms: int) -> None:
    out, lse = decode(problem, causal=causal, num_sms=num_sms)
    expected = reference.mla_decode(
        problem.q, problem.kv_cache, problem.block_table, problem.seq_lens, softmax_scale=SCALE, causal=causal
    )
    assert out.dtype == problem.q.dtype and lse.dtype == torch.float32
    check_close(out, lse, *expected)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("s_q", [1, 2, 4])
@pytest.mark.parametrize("h_q, h_kv", HEADS)
def test_heads_and_query_lengths(h_q: int, h_kv: int, s_q: int, causal: bool) -> None:
    problem = make_problem(EDGE_LENGTHS, s_q=s_q, h_q=h_q, h_kv=h_kv)
    check_against_oracle(problem, causal=causal, num_sms=48)


@pytest.mark.parametrize("page_size", [16, 32, 64, 128, 256])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_page_sizes_and_dtypes(page_size: int, dtype: torch.dtype) -> None:
    problem = make_problem([0, 15, 16, 17, 64, 100, 255, 256, 257, 700], h_q=8, page_size=page_size, dtype=dtype)
    check_against_oracle(problem, causal=True, num_sms=12)


@pytest.mark.parametrize("s_q", range(1, 9))
def test_long_speculation(s_q: int) -> None:
    """Rows before the request's first token see nothing: lengths below s_q included."""
    check_against_oracle(make_problem([1, 3, 7, 8, 66, 300], s_q=s_q, h_q=4), causal=True, num_sms=6)


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 900), min_size=1, max_size=6),
    s_q=st.integers(1, 4),
    num_sms=st.sampled_from([1, 3, 16, 132]),
    page_size=st.sampled_from([16, 64, 128]),
    causal=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_random_batches(lengths: list[int], s_q: int, num_sms: int, page_size: int, causal: bool, seed: int) -> None:
    problem = make_problem(lengths, s_q=s_q, h_q=6, h_kv=2, page_size=page_size, dtype=torch.float16, seed=seed)
    check_against_oracle(problem, causal=causal, num_sms=num_sms)


def test_splitting_changes_nothing_but_rounding() -> None:
    problem = make_problem([5000], h_q=8, dtype=torch.float32)
    whole, cut = (decode(problem, causal=True, num_sms=n) for n in (1, 132))
    torch.testing.assert_close(whole[0], cut[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(whole[1], cut[1], rtol=1e-6, atol=1e-6)


def test_empty_batch() -> None:
    out, lse = decode(make_problem([], h_q=4), causal=True, num_sms=4)
    assert out.shape == (0, 1, 4, 512) and lse.shape == (0, 1, 4)


def test_inputs_may_be_views() -> None:
    """A cache sliced out of a wider one and a query with padded heads give the same answer."""
    problem = make_problem([100, 65], h_q=8)
    wide = torch.full((problem.kv_cache.shape[0], 2, 64, 1, 640), float("nan"), dtype=torch.bfloat16)
    wide[:, 1, :, :, :576] = problem.kv_cache
    padded = torch.full((2, 1, 11, 700), float("nan"), dtype=torch.bfloat16)
    padded[:, :, :8, :576] = problem.q
    views = Problem(padded[:, :, :8, :576], wide[:, 1, :, :, :576], problem.block_table, problem.seq_lens)
    for ours, expected in zip(
        decode(views, causal=True, num_sms=4), decode(problem, causal=True, num_sms=4), strict=True
    ):
        assert torch.equal(ours, expected)


def test_large_scores_do_not_overflow() -> None:
    problem = make_problem([130, 64], h_q=4, dtype=torch.float32)
    problem.q.mul_(100.0)
    check_against_oracle(problem, causal=True, num_sms=8)


def test_latent_and_rope_columns_may_lie_apart() -> None:
    problem = make_problem([1, 70, 300], s_q=2, h_q=6)
    plan = flashmla_backend.plan_decode(problem.seq_lens, problem.block_table, s_q=2, h_q=6)
    parts = problem.q[..., :512].clone(), problem.q[..., 512:].clone()
    together = flashmla_backend.mla_decode(problem.q, problem.kv_cache, plan, softmax_scale=SCALE)
    apart = flashmla_backend.mla_decode(parts, problem.kv_cache, plan, softmax_scale=SCALE)
    assert torch.equal(together[0], apart[0]) and torch.equal(together[1], apart[1])
    with pytest.raises(flashmla_backend.InvalidArgument, match=r"q is a list; accepted: a tensor, or a pair"):
        flashmla_backend.mla_decode(list(parts), problem.kv_cache, plan, softmax_scale=SCALE)  # type: ignore[arg-type]
    with pytest.raises(flashmla_backend.InvalidArgument, match=r"q\[1\] is .*; accepted: \[B, S_q, H_q, 64\]"):
        flashmla_backend.mla_decode((parts[0], parts[0]), problem.kv_cache, plan, softmax_scale=SCALE)
