"""Who is measured: our kernels, the naive one, torch's textbook forms, and the rivals that are installed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch

import flashmla_backend
from flashmla_backend import baselines, native
from flashmla_backend.bench import rivals
from flashmla_backend.bench.problems import Problem
from flashmla_backend.errors import InvalidArgument
from flashmla_backend.paging import D_QK, D_V
from flashmla_backend.schedule import pages_of
from flashmla_backend.workspace import workspace_size

Call = Callable[[], torch.Tensor]  # -> out [B, S_q, H_q, 512]
Prepare = Callable[[Problem], list[Call]]  # one call for each rotation; planning happens here, outside the timing

CHUNK_TOKENS = 4096


class Unavailable(Exception):
    """The contender cannot run here; the message says why."""


class Contender(NamedTuple):
    name: str
    prepare: Prepare
    is_rival: bool


def load_ours(device: torch.device, batch_invariant: bool = False) -> Prepare:
    """The public API: a plan for the step, then the call of one layer; calls share a workspace, as layers do."""

    def prepare(problem: Problem) -> list[Call]:
        size = workspace_size(device, s_q=problem.s_q, h_q=problem.heads, batch_invariant=batch_invariant)
        workspace = torch.empty(size, device=device)

        def call(r: int) -> Call:
            plan = flashmla_backend.plan_decode(
                problem.seq_lens,
                problem.block_tables[r],
                s_q=problem.s_q,
                h_q=problem.heads,
                num_pages=problem.cache.shape[0],
                batch_invariant=batch_invariant,
                workspace=workspace,
            )
            q, cache, scale = problem.queries[r], problem.cache, problem.softmax_scale
            return lambda: flashmla_backend.mla_decode(q, cache, plan, softmax_scale=scale)[0]

        return [call(r) for r in range(problem.rotations)]

    return prepare


def load_naive(device: torch.device) -> Prepare:
    """Our textbook CUDA kernel: a thread block per query row, no tensor cores."""
    if device.type != "cuda":
        raise Unavailable("a CUDA kernel")
    naive_decode = native.load().naive_decode

    def prepare(problem: Problem) -> list[Call]:
        shape = (problem.batch, problem.s_q, problem.heads)
        out = torch.empty(*shape, D_V, dtype=torch.bfloat16, device=device)
        lse = torch.empty(shape, dtype=torch.float32, device=device)

        def call(r: int) -> Call:
            q, table, cache = problem.queries[r], problem.block_tables[r], problem.cache

            def decode() -> torch.Tensor:
                naive_decode(
                    dtype=0,
                    shape=(*shape, 1),
                    page_size=cache.shape[1],
                    num_pages=cache.shape[0],
                    causal=True,
                    softmax_scale=problem.softmax_scale,
                    q_latent=q.data_ptr(),
                    q_latent_strides=q.stride()[:3],
                    q_rope=q[..., D_V:].data_ptr(),
                    q_rope_strides=q.stride()[:3],
                    kv=cache.data_ptr(),
                    kv_strides=cache.stride()[:3],
                    seq_lens=problem.seq_lens.data_ptr(),
                    block_table=table.data_ptr(),
                    block_table_stride=table.stride(0),
                    out=out.data_ptr(),
                    lse=lse.data_ptr(),
                    stream=torch.cuda.current_stream().cuda_stream,
                )
                return out

            return decode

        return [call(r) for r in range(problem.rotations)]

    return prepare


def over_requests(attend: Callable[[torch.Tensor, torch.Tensor, float], torch.Tensor]) -> Prepare:
    """A baseline for one request's contiguous tokens, request after request, its pages gathered first."""

    def prepare(problem: Problem) -> list[Call]:
        def one(r: int, request: int) -> torch.Tensor:
            length = problem.lengths[request]
            pages = problem.block_tables[r][request, : pages_of(length)]
            kv = problem.cache.index_select(0, pages).view(-1, D_QK)[:length]
            return attend(problem.queries[r][request], kv, problem.softmax_scale)

        def call(r: int) -> Call:
            return lambda: torch.stack([one(r, request) for request in range(problem.batch)])

        return [call(r) for r in range(problem.rotations)]

    return prepare


def load_absorbed(device: torch.device) -> Prepare:
    """torch: all scores of a request at once."""
    return over_requests(lambda q, kv, scale: baselines.absorbed(q, kv, scale)[0])


def load_chunked(device: torch.device) -> Prepare:
    """torch: an online softmax over chunks of tokens."""
    return over_requests(lambda q, kv, scale: baselines.chunked(q, kv, scale, chunk_tokens=CHUNK_TOKENS)[0])


OURS = "ours"
INVARIANT = "ours-invariant"
LOADERS: dict[str, Callable[[torch.device], Prepare]] = {
    OURS: load_ours,
    INVARIANT: partial(load_ours, batch_invariant=True),
    "naive": load_naive,
    "torch_absorbed": load_absorbed,
    "torch_chunked": load_chunked,
    **rivals.LOADERS,
}


def load(names: Sequence[str], device: torch.device) -> tuple[list[Contender], dict[str, str]]:
    """The contenders that can run here, and why the others cannot."""
    if unknown := [name for name in names if name not in LOADERS]:
        raise InvalidArgument(f"impls names {', '.join(unknown)}; accepted: {', '.join(LOADERS)}")
    contenders, reasons = [], {}
    for name in names:
        try:
            contenders.append(Contender(name, LOADERS[name](device), name in rivals.LOADERS))
        except Exception as error:  # optional packages fail to import in many ways
            reasons[name] = str(error).partition("\n")[0] or type(error).__name__
    return contenders, reasons
