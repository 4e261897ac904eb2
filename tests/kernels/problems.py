"""Decode problems on the GPU and their right answers, in whole-batch torch. Everything unused is poison.

The distribution is that of FlashMLA's own tests, q = randn and kv = randn / 10: with larger values the rounding of the
softmax weights to 16 bits alone exceeds the bounds.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TypeVar

import torch

import flashmla_backend

POISON_PAGE = 2147480000
SCALE = 576**-0.5
Results = TypeVar("Results")


@dataclass(frozen=True)
class Case:
    batch: int
    s_q: int
    s_k: int
    h_q: int
    h_kv: int
    ragged: bool
    causal: bool
    dtype: torch.dtype
    page_size: int = 64

    def lengths(self) -> list[int]:
        """`s_k` for all, or around it: from 0 to 2 * s_k, an empty one among them."""
        if not self.ragged:
            return [self.s_k] * self.batch
        generator = torch.Generator().manual_seed(self.batch + self.s_k)
        lengths = torch.randint(0, 2 * self.s_k, (self.batch,), generator=generator).tolist()
        return [*lengths[:-1], 0] if self.batch > 1 else lengths


HEADS = [(h_q, h_kv) for h_q in (1, 3, 9, 16, 20, 63, 64, 126, 128) for h_kv in (1, 2, 3, 8) if h_q % h_kv == 0]
DTYPES = (torch.bfloat16, torch.float16)


def grid(h_q: int, h_kv: int, s_q: int, dtype: torch.dtype) -> Iterator[Case]:
    for batch, s_k, ragged, causal in itertools.product((1, 2, 6, 64), (20, 140, 4096), (False, True), (False, True)):
        yield Case(batch, s_q, s_k, h_q, h_kv, ragged, causal, dtype)


@dataclass
class Problem:
    q: torch.Tensor  # [B, S_q, H_q, 576]
    kv_cache: torch.Tensor  # [P, page_size, H_kv, 576], NaN wherever no request has written
    block_table: torch.Tensor  # [B, W] int32, POISON_PAGE past each request's last page
    seq_lens: torch.Tensor  # [B] int32
    tokens: torch.Tensor  # [B, L, H_kv, 576], what the cache holds, 0 past each length


def make_problem(
    lengths: list[int],
    *,
    s_q: int = 1,
    h_q: int = 16,
    h_kv: int = 1,
    page_size: int = 64,
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
    device: str = "cuda",
) -> Problem:
    generator = torch.Generator(device).manual_seed(seed)
    batch, longest = len(lengths), max([*lengths, 1])
    seq_lens = torch.tensor(lengths, dtype=torch.int32, device=device)
    valid = torch.arange(longest, device=device) < seq_lens[:, None]  # [B, L]
    tokens = torch.randn(batch, longest, h_kv, 576, generator=generator, device=device, dtype=torch.float32) / 10
    tokens = (tokens * valid[:, :, None, None]).to(dtype)
    block_table, num_pages = make_block_table(seq_lens, page_size, generator)
    kv_cache = torch.full((num_pages, page_size, h_kv, 576), float("nan"), dtype=dtype, device=device)
    request, token = valid.nonzero(as_tuple=True)
    kv_cache[block_table[request, token // page_size].long(), token % page_size] = tokens[request, token]
    q = torch.randn(batch, s_q, h_q, 576, generator=generator, device=device, dtype=torch.float32).to(dtype)
    return Problem(q, kv_cache, block_table, seq_lens, tokens)


def make_block_table(seq_lens: torch.Tensor, page_size: int, generator: torch.Generator) -> tuple[torch.Tensor, int]:
    """Shuffled pages, two poisoned columns and three unused pages; also the number of pages."""
    device = seq_lens.device
    counts = (seq_lens.long() + page_size - 1) // page_size
    num_pages = int(counts.sum()) + 3
    width = int(counts.max()) + 2
    used = torch.arange(width, device=device) < counts[:, None]
    ids = torch.randperm(num_pages, generator=generator, device=device).int()
    block_table = torch.full((len(seq_lens), width), POISON_PAGE, dtype=torch.int32, device=device)
    block_table[used] = ids[: int(counts.sum())]
    return block_table, num_pages


def oracle(problem: Problem, *, causal: bool, scale: float = SCALE) -> tuple[torch.Tensor, torch.Tensor]:
    """out [B, S_q, H_q, 512] and lse [B, S_q, H_q] in fp64, by the textbook formula."""
    batch, s_q, h_q, _ = problem.q.shape
    h_kv = problem.tokens.shape[2]
    length = problem.seq_lens.long()[:, None]
    query = torch.arange(s_q, device=length.device)
    visible = length - (s_q - 1 - query) if causal else length.expand(-1, s_q)  # [B, S_q]
    hidden = torch.arange(problem.tokens.shape[1], device=length.device) >= visible[..., None]  # [B, S_q, L]
    out = torch.empty(batch, s_q, h_q, 512, dtype=torch.float64, device=length.device)
    lse = torch.empty(batch, s_q, h_q, dtype=torch.float64, device=length.device)
    group = h_q // h_kv
    for head in range(h_kv):
        own = slice(head * group, (head + 1) * group)
        kv = problem.tokens[:, :, head].double()  # [B, L, 576]
        rows = problem.q[:, :, own].double().flatten(1, 2)  # [B, S_q * group, 576]
        scores = (rows @ kv.mT).unflatten(1, (s_q, group)) * scale  # [B, S_q, group, L]
        scores.masked_fill_(hidden[:, :, None], float("-inf"))
        lse[:, :, own] = torch.logsumexp(scores, dim=-1)
        weights = torch.softmax(scores, dim=-1).masked_fill_((visible <= 0)[:, :, None, None], 0.0)
        out[:, :, own] = (weights.flatten(1, 2) @ kv[..., :512]).unflatten(1, (s_q, group))
    return out, lse


def plan_of(problem: Problem, *, causal: bool, **options: object) -> flashmla_backend.DecodePlan:
    return flashmla_backend.plan_decode(
        problem.seq_lens,
        problem.block_table,
        s_q=problem.q.shape[1],
        h_q=problem.q.shape[2],
        h_kv=problem.kv_cache.shape[2],
        page_size=problem.kv_cache.shape[1],
        causal=causal,
        num_pages=problem.kv_cache.shape[0],
        **options,  # type: ignore[arg-type]
    )


def decode(problem: Problem, *, causal: bool, scale: float = SCALE) -> tuple[torch.Tensor, torch.Tensor]:
    plan = plan_of(problem, causal=causal)
    return flashmla_backend.mla_decode(problem.q, problem.kv_cache, plan, softmax_scale=scale)


def fault(out: torch.Tensor, lse: torch.Tensor, expected_out: torch.Tensor, expected_lse: torch.Tensor) -> str | None:
    """What is wrong by FlashMLA's own bounds, in a sentence; None if nothing is."""
    if out.isnan().any() or lse.isnan().any():
        return f"NaN: {int(out.isnan().sum())} in out, {int(lse.isnan().sum())} in lse"
    if not torch.equal(lse.isinf(), expected_lse.isinf()):
        return "lse is infinite in the wrong places"
    finite = expected_lse.isfinite()
    for name, x, y, absolute, relative in (
        ("out", out.double(), expected_out, 8e-4, 2.01 / 128),
        ("lse", lse[finite].double(), expected_lse[finite], 1e-6, 8.01 / 65536),
    ):
        error = (x - y).abs()
        wrong = (error > absolute) & (error > relative * y.abs())
        if wrong.any():
            worst = int(error.masked_fill(~wrong, 0).argmax())
            return (
                f"{name}: {int(wrong.sum())} of {x.numel()} out of bounds, worst at {worst}: "
                f"{float(x.flatten()[worst]):.6g} instead of {float(y.flatten()[worst]):.6g}"
            )
    x, y = out.double().flatten(), expected_out.flatten()
    if y.norm() > 0:
        difference = float(1 - 2 * (x @ y) / (x @ x + y @ y))
        if difference >= 5e-6:
            return f"out: cosine difference {difference:.3g}"
    return None


def fault_of(case: Case) -> str | None:
    """Decode the case and judge it."""
    problem = problem_of(replace(case, causal=False))
    return fault(*decode(problem, causal=case.causal), *oracle(problem, causal=case.causal))


@lru_cache(maxsize=1)
def problem_of(case: Case) -> Problem:
    """The grid's neighbours, with and without a mask, share their data."""
    return make_problem(
        case.lengths(), s_q=case.s_q, h_q=case.h_q, h_kv=case.h_kv, page_size=case.page_size, dtype=case.dtype
    )


def capture(run: Callable[[], Results]) -> tuple[torch.cuda.CUDAGraph, Results]:
    """A graph of what `run` enqueues, and what it returns, which every replay writes anew."""
    run()  # loads the kernels
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = run()
    return graph, results
