"""Batch-invariant mode: a request's output and LSE have the same bits alone and in any batch, and are right."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

import flashmla_backend
from flashmla_backend.leaves import MIN_LEAF_PAGES, MIN_SHARED_LEAF_PAGES
from tests.kernels.problems import DTYPES, POISON_PAGE, SCALE, Problem, capture, fault, make_problem, oracle, plan_of

Record = Callable[[str, object], None]

# Across page edges (64 tokens) and the lengths where leaves become twice as many.
MORE_LEAVES = [
    64 * (leaves * smallest - 1) + tokens
    for smallest in (MIN_LEAF_PAGES, MIN_SHARED_LEAF_PAGES)
    for leaves in (2, 4, 8, 16)
    for tokens in (0, 1)
]
EDGES = [1, 3, 63, 64, 65, 255, 257, 448, 511, 512, 513, 767, 769, 1000, 1024, 1025, 1537, 3073, 4097, 9000, 20011]
NEEDLES = sorted({*EDGES, *MORE_LEAVES})
BATCHES = [1, 2, 5, 16, 64, 256]
PAD = -1
SMALL_AND_LARGE_PAGES = [(16, 2, 1, 64), (128, 2, 3, 256), (126, 3, 1, 128), (128, 1, 1, 16), (20, 2, 2, 32)]


def decode(problem: Problem) -> tuple[torch.Tensor, torch.Tensor]:
    plan = plan_of(problem, causal=True, batch_invariant=True)
    return flashmla_backend.mla_decode(problem.q, problem.kv_cache, plan, softmax_scale=SCALE)


def put_together(needles: Problem, requests: list[int], seed: int) -> Problem:
    """A batch of these requests, PAD for one of length 0: their pages shuffled, all else in the cache is NaN."""
    device, page_size = needles.q.device, needles.kv_cache.shape[1]
    chosen = torch.tensor(requests, device=device)
    seq_lens = torch.where(chosen == PAD, 0, needles.seq_lens[chosen])
    counts = (seq_lens.long() + page_size - 1) // page_size
    width = needles.block_table.shape[1]
    used = torch.arange(width, device=device) < counts[:, None]
    ids = torch.randperm(int(counts.sum()) + 3, generator=torch.Generator(device).manual_seed(seed), device=device)
    cache = torch.full((len(ids), *needles.kv_cache.shape[1:]), float("nan"), dtype=needles.q.dtype, device=device)
    table = torch.full((len(requests), width), POISON_PAGE, dtype=torch.int32, device=device)
    table[used] = ids[: int(counts.sum())].int()
    cache[table[used].long()] = needles.kv_cache[needles.block_table[chosen][used].long()]
    return replace(needles, q=needles.q[chosen].contiguous(), kv_cache=cache, block_table=table, seq_lens=seq_lens)


def check_in_batches(needles: Problem, source: random.Random, batches: list[int]) -> int:
    """Needles alone, judged by the oracle; then in batches. Returns how many (needle, batch) were compared."""
    alone = decode_alone(needles)
    expected = [oracle(one(needles, r), causal=True) for r in range(len(needles.seq_lens))]
    assert fault(*alone, *(torch.cat(results) for results in zip(*expected, strict=True))) is None
    return compare_in_batches(needles, alone, source, batches)


def decode_alone(needles: Problem) -> tuple[torch.Tensor, torch.Tensor]:
    alone = [decode(put_together(needles, [r], seed=r)) for r in range(len(needles.seq_lens))]
    out, lse = (torch.cat(results) for results in zip(*alone, strict=True))
    return out, lse


def compare_in_batches(
    needles: Problem, alone: tuple[torch.Tensor, torch.Tensor], source: random.Random, batches: list[int]
) -> int:
    count = len(needles.seq_lens)
    compared = 0
    for batch in batches:
        requests = [source.choice([PAD, *range(count)]) if batch > 1 else 0 for _ in range(batch)]
        together = decode(put_together(needles, requests, seed=1000 + batch))
        rows = torch.tensor([row for row, r in enumerate(requests) if r != PAD], device=needles.q.device)
        own = torch.tensor([r for r in requests if r != PAD], device=needles.q.device)
        for ours, theirs in zip(together, alone, strict=True):
            equal = (ours[rows] == theirs[own]).flatten(1).all(1)
            wrong = sorted({int(needles.seq_lens[r]) for r in own[~equal].tolist()})
            assert not wrong, f"lengths {wrong} in a batch of {batch} differ from the same alone"
        compared += len(own)
    return compared


def one(problem: Problem, request: int) -> Problem:
    own = slice(request, request + 1)
    length = int(problem.seq_lens[request])
    return replace(
        problem,
        q=problem.q[own],
        block_table=problem.block_table[own],
        seq_lens=problem.seq_lens[own],
        tokens=problem.tokens[own, :length],
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("s_q", [1, 2, 4])
@pytest.mark.parametrize("h_q", [1, 16, 20, 64, 128])
def test_needles(h_q: int, s_q: int, dtype: torch.dtype, record_property: Record) -> None:
    source = random.Random(h_q + s_q)
    chosen = [*source.sample(NEEDLES, 7), source.randint(1, 9000)]
    needles = make_problem(chosen, s_q=s_q, h_q=h_q, dtype=dtype)
    record_property("cases", check_in_batches(needles, source, BATCHES))


@pytest.mark.parametrize("h_q, s_q", [(33, 1), (64, 1), (97, 1), (128, 2)])
def test_rows_that_rescale_at_different_pages(h_q: int, s_q: int, record_property: Record) -> None:
    """O is rescaled by a vote of rows; they must have the same say wherever the request lies."""
    needles = make_problem([640, 1025, 2049, 5000], s_q=s_q, h_q=h_q)
    needles.q *= 40  # scores deviate by 4: the oracle's bounds are for less than that
    alone = decode_alone(needles)
    record_property("cases", compare_in_batches(needles, alone, random.Random(0), [1, 3, 40, 200]))


@pytest.mark.parametrize("h_q, h_kv, s_q, page_size", SMALL_AND_LARGE_PAGES)
def test_kv_heads_and_page_sizes(h_q: int, h_kv: int, s_q: int, page_size: int, record_property: Record) -> None:
    needles = make_problem([1, 448, 513, 2049, 7000], s_q=s_q, h_q=h_q, h_kv=h_kv, page_size=page_size)
    record_property("cases", check_in_batches(needles, random.Random(0), [3, 40]))


def test_beside_one_long_request(record_property: Record) -> None:
    """The longest leaves, and neighbours that are cut differently because of them."""
    needles = make_problem([300_000, 513, 64, 20_000], h_q=16)
    record_property("cases", check_in_batches(needles, random.Random(0), [2, 4, 9]))


def test_rows_that_see_nothing() -> None:
    """Fewer tokens than queries, and none: LSE -inf and zeros, alone as in a batch."""
    needles = make_problem([1, 2, 5, 66, 600], s_q=5, h_q=7)
    check_in_batches(needles, random.Random(0), [1, 8, 30])


@pytest.mark.parametrize("h_q, s_q", [(16, 1), (128, 2)])
def test_replayed_graphs(h_q: int, s_q: int, record_property: Record) -> None:
    """Schedule and a layer in one graph, captured with 24 requests and replayed with other lengths, many of them 0."""
    source = random.Random(0)
    needles = make_problem([source.randint(1, 5000) for _ in range(12)], s_q=s_q, h_q=h_q)
    requests = list(range(12)) * 2
    largest = put_together(needles, requests, seed=0)
    room = torch.full_like(largest.kv_cache, float("nan"))
    persistent = replace(largest, kv_cache=room, **{n: getattr(largest, n).clone() for n in ("q", "block_table")})
    persistent.seq_lens = largest.seq_lens.clone()
    plan = plan_of(persistent, causal=True, batch_invariant=True)

    def step() -> tuple[torch.Tensor, torch.Tensor]:
        again = plan_of(persistent, causal=True, batch_invariant=True, reuse=plan)
        return flashmla_backend.mla_decode(persistent.q, persistent.kv_cache, again, softmax_scale=SCALE)

    graph, captured = capture(step)
    alone = [decode(put_together(needles, [r], seed=r)) for r in range(12)]
    compared = 0
    for replay in range(20):
        source.shuffle(requests)
        chosen = [r if source.random() < 0.7 else PAD for r in requests]
        batch = put_together(needles, chosen, seed=replay)
        persistent.q.copy_(batch.q)
        persistent.block_table.copy_(batch.block_table)
        persistent.seq_lens.copy_(batch.seq_lens)
        persistent.kv_cache.fill_(float("nan"))[: len(batch.kv_cache)] = batch.kv_cache
        graph.replay()
        for row, r in enumerate(chosen):
            if r != PAD:
                assert torch.equal(captured[0][row], alone[r][0][0]) and torch.equal(captured[1][row], alone[r][1][0])
                compared += 1
    record_property("cases", compared)
