"""Whatever lies in what a request does not own must not change one bit of its answer.

Not owned: pages of others or of nobody, rows past its length, table entries past its pages, the others' queries, the
space between rows and heads, and the workspaces. Half of the requests are watched while all of that is filled.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch

from flashmla_backend import mla_decode, plan_decode
from tests.kernels.problems import POISON_PAGE, SCALE, Problem, make_problem, plan_of

# Empty requests, both sides of every page's edge, and some that are cut.
LENGTHS = [
    0,
    3000,
    1,
    63,
    64,
    65,
    127,
    2000,
    128,
    129,
    200,
    255,
    256,
    257,
    0,
    300,
    447,
    511,
    513,
    5,
    700,
    1000,
    1300,
    70,
]
GAP = 64  # columns between one row and the next, one page and the next

# Ways to plan, each of which must keep requests apart.
MODES: list[dict[str, object]] = [{}]
if "batch_invariant" in inspect.signature(plan_decode).parameters:
    MODES.append({"batch_invariant": True})


class Fill(NamedTuple):
    """What stands in everything not owned."""

    name: str
    put: Callable[[torch.Tensor], object]  # into a contiguous tensor
    entry: int  # of unused table entries


FILLS = (
    Fill("NaN", lambda x: x.fill_(float("nan")), POISON_PAGE),
    Fill("inf", lambda x: x.fill_(float("inf")), -1),
    Fill("-inf", lambda x: x.fill_(float("-inf")), -(2**31)),
    Fill("0xFF bytes", lambda x: x.view(torch.uint8).fill_(255), -1),
    Fill("huge values", lambda x: x.fill_(torch.finfo(x.dtype).max), 2**31 - 1),
    Fill("other requests' data", lambda x: x.normal_(0, 0.1), 0),
)
CALM = Fill("zeros", lambda x: x.zero_(), 0)


@dataclass(frozen=True)
class Variant:
    page_size: int
    dtype: torch.dtype
    s_q: int
    causal: bool
    h_q: int = 16
    h_kv: int = 1


def surrounded(problem: Problem, watched: torch.Tensor, fill: Fill) -> Problem:
    """The problem with all that the watched requests [B] bool do not own filled, and rows GAP columns apart."""
    lengths, page_size = problem.seq_lens.long(), problem.kv_cache.shape[1]
    token = torch.arange(problem.block_table.shape[1] * page_size, device=lengths.device)
    request, token = ((token < lengths[:, None]) & watched[:, None]).nonzero(as_tuple=True)
    page, row = problem.block_table[request, token // page_size].long(), token % page_size

    def room(like: torch.Tensor) -> torch.Tensor:
        wide = like.new_empty(*like.shape[:-1], like.shape[-1] + GAP)
        fill.put(wide)
        return wide[..., : like.shape[-1]]

    kv_cache, q = room(problem.kv_cache), room(problem.q)
    kv_cache[page, row] = problem.kv_cache[page, row]
    q[watched] = problem.q[watched]
    column = torch.arange(problem.block_table.shape[1], device=lengths.device)
    unused = column >= ((lengths + page_size - 1) // page_size)[:, None]
    block_table = problem.block_table.masked_fill(unused, fill.entry)
    return Problem(q, kv_cache, block_table, problem.seq_lens, problem.tokens)


def decode_with(
    fill: Fill, problem: Problem, causal: bool, mode: dict[str, object]
) -> tuple[torch.Tensor, torch.Tensor]:
    plan = plan_of(problem, causal=causal, **mode)
    for workspace in (plan.partial_out, plan.partial_lse):
        fill.put(workspace)
    return mla_decode(problem.q, problem.kv_cache, plan, softmax_scale=SCALE)


def same_bits(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """[B] bool: whether request by request all bits are the same, NaN and the sign of zero included."""
    return (x.contiguous().view(torch.uint8) == y.contiguous().view(torch.uint8)).flatten(1).all(1)


def leaks(
    variant: Variant,
    mode: dict[str, object],
    device: str,
    lengths: list[int] = LENGTHS,
    decode: Callable[..., tuple[torch.Tensor, torch.Tensor]] = decode_with,
) -> tuple[int, list[str]]:
    """How many cases were tried (a request and a fill), and which of them changed."""
    problem = make_problem(
        lengths,
        s_q=variant.s_q,
        h_q=variant.h_q,
        h_kv=variant.h_kv,
        page_size=variant.page_size,
        dtype=variant.dtype,
        device=device,
    )
    everyone = torch.ones(len(lengths), dtype=torch.bool, device=device)
    calm = decode(CALM, surrounded(problem, everyone, CALM), variant.causal, mode)
    changed = []
    for fill in FILLS:
        for half in range(2):
            watched = torch.arange(len(lengths), device=device) % 2 == half
            result = decode(fill, surrounded(problem, watched, fill), variant.causal, mode)
            changed.append(watched & ~(same_bits(result[0], calm[0]) & same_bits(result[1], calm[1])))
    wrong = torch.stack(changed).cpu().unflatten(0, (len(FILLS), 2)).any(1)  # [fills, B]
    faults = [f"{FILLS[f].name}: request {r} of {lengths[r]} tokens" for f, r in wrong.nonzero().tolist()]
    if calm[0].isnan().any() or calm[1].isnan().any():
        faults.append("NaN among zeros")
    return wrong.numel(), faults


def own_nan(mode: dict[str, object], device: str) -> list[str]:
    """What is wrong with answers where a request's own token or query is NaN: all that sees it must be, LSE as well."""
    problem = make_problem([3000, 70, 0, 500], s_q=2, h_q=4, device=device)
    plan = plan_of(problem, causal=True, **mode)
    before = mla_decode(problem.q, problem.kv_cache, plan, softmax_scale=SCALE)
    cache, q = problem.kv_cache.clone(), problem.q.clone()
    cache[problem.block_table[0, 1000 // 64].long(), 1000 % 64] = float("nan")
    q[3, 1, 2] = float("nan")
    hit = torch.zeros(4, 2, 4, dtype=torch.bool, device=device)
    hit[0] = hit[3, 1, 2] = True
    wrong = []
    for name, was, now in zip(("out", "lse"), before, mla_decode(q, cache, plan, softmax_scale=SCALE), strict=True):
        if not now[hit].isnan().all():
            wrong.append(f"{name} hides NaN")
        if not torch.equal(now[~hit], was[~hit]):
            wrong.append(f"{name} of others changed")
    return wrong
