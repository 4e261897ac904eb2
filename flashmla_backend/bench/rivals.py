"""Other people's Hopper kernels, called as engines call them. Each loader imports its package and says if it cannot."""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import torch

from flashmla_backend.bench.problems import Problem
from flashmla_backend.errors import Unsupported
from flashmla_backend.paging import D_QK, D_V
from flashmla_backend.schedule import TILE_TOKENS, pages_of

if TYPE_CHECKING:
    from flashmla_backend.bench.contenders import Call, Prepare

D_ROPE = D_QK - D_V
GRAPH_SPLITS = 32  # of FA3 under full CUDA graphs in vLLM
FLASHINFER_SCRATCH_BYTES = 256 << 20


def need_hopper(device: torch.device) -> None:
    if device.type != "cuda" or torch.cuda.get_device_capability(device) != (9, 0):
        raise Unsupported("a kernel for Hopper GPUs")


def each_rotation(make: Callable[[Problem, int], Call]) -> Prepare:
    return lambda problem: [make(problem, r) for r in range(problem.rotations)]


def split_query(problem: Problem, r: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Latent [B * S_q, H_q, 512] and rope [B * S_q, H_q, 64] parts, each contiguous."""
    q = problem.queries[r].flatten(0, 1)
    return q[..., :D_V].contiguous(), q[..., D_V:].contiguous()


def query_offsets(problem: Problem) -> torch.Tensor:
    """[B + 1] int32"""
    return torch.arange(problem.batch + 1, dtype=torch.int32, device=problem.cache.device) * problem.s_q


def load_flashmla(device: torch.device) -> Prepare:
    """FlashMLA as vLLM bundles it. Its schedule is made by the first call and kept, as for the layers of a step."""
    need_hopper(device)
    import vllm.v1.attention.ops.flashmla as flashmla

    supported, reason = flashmla.is_flashmla_dense_supported()
    if not supported:
        raise Unsupported(str(reason))

    def make(problem: Problem, r: int) -> Call:
        schedule, _ = flashmla.get_mla_metadata()

        def call() -> torch.Tensor:
            out, _ = flashmla.flash_mla_with_kvcache(
                problem.queries[r],
                problem.cache,
                problem.block_tables[r],
                problem.seq_lens,
                D_V,
                schedule,
                softmax_scale=problem.softmax_scale,
                causal=True,
            )
            return out

        return call

    return each_rotation(make)


def load_fa3(device: torch.device, num_splits: int) -> Prepare:
    """FlashAttention 3 as vLLM bundles it; 0 splits lets it choose."""
    need_hopper(device)
    from vllm.vllm_flash_attn import flash_attn_varlen_func, get_scheduler_metadata

    def prepare(problem: Problem) -> list[Call]:
        offsets, longest = query_offsets(problem), max(problem.lengths)
        schedule = get_scheduler_metadata(
            batch_size=problem.batch,
            max_seqlen_q=problem.s_q,
            max_seqlen_k=longest,
            num_heads_q=problem.heads,
            num_heads_kv=1,
            headdim=D_ROPE,
            headdim_v=D_V,
            cache_seqlens=problem.seq_lens,
            qkv_dtype=problem.cache.dtype,
            page_size=TILE_TOKENS,
            cu_seqlens_q=offsets,
            causal=True,
            num_splits=num_splits,
        )

        def make(problem: Problem, r: int) -> Call:
            latent, rope = split_query(problem, r)

            def call() -> torch.Tensor:
                out = flash_attn_varlen_func(
                    q=rope,
                    k=problem.cache[..., D_V:],
                    v=problem.cache[..., :D_V],
                    q_v=latent,
                    max_seqlen_q=problem.s_q,
                    cu_seqlens_q=offsets,
                    max_seqlen_k=longest,
                    seqused_k=problem.seq_lens,
                    block_table=problem.block_tables[r],
                    softmax_scale=problem.softmax_scale,
                    causal=True,
                    fa_version=3,
                    scheduler_metadata=schedule,
                    num_splits=num_splits,
                )
                return out.view((*problem.queries[r].shape[:3], D_V))

            return call

        return each_rotation(make)(problem)

    return prepare


def load_flashinfer(device: torch.device) -> Prepare:
    """FlashInfer's MLA wrapper with its Hopper kernel."""
    need_hopper(device)
    from flashinfer.mla import BatchMLAPagedAttentionWrapper

    scratch = torch.empty(FLASHINFER_SCRATCH_BYTES, dtype=torch.uint8, device=device)  # calls run in order: one for all

    def make(problem: Problem, r: int) -> Call:
        offsets = [0, *accumulate(map(pages_of, problem.lengths))]
        wrapper: Any = BatchMLAPagedAttentionWrapper(scratch, backend="fa3")
        wrapper.plan(
            query_offsets(problem),
            torch.tensor(offsets, dtype=torch.int32, device=device),
            problem.page_ids[r],
            problem.seq_lens,
            problem.heads,
            D_V,
            D_ROPE,
            TILE_TOKENS,
            True,
            problem.softmax_scale,
            problem.cache.dtype,
            problem.cache.dtype,
        )
        latent, rope = split_query(problem, r)
        pages = problem.cache.squeeze(2)
        out = torch.empty_like(latent)

        def call() -> torch.Tensor:
            wrapper.run(latent, rope, pages[..., :D_V], pages[..., D_V:], out=out)
            return out.view((*problem.queries[r].shape[:3], D_V))

        return call

    return each_rotation(make)


LOADERS: dict[str, Callable[[torch.device], Prepare]] = {
    "flashmla": load_flashmla,
    "fa3": lambda device: load_fa3(device, GRAPH_SPLITS),
    "fa3auto": lambda device: load_fa3(device, 0),
    "flashinfer": load_flashinfer,
}
