"""MLA decode through FlashInfer, for NVIDIA GPUs that our kernels do not run on (sm_80, sm_86, sm_89, ...).

FlashInfer plans on the host: it copies the lengths there once a step, which waits for the GPU, and a plan cannot be
made while a CUDA graph is captured. (Interface: flashinfer.mla.BatchMLAPagedAttentionWrapper.)
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch

from flashmla_backend.errors import Unsupported
from flashmla_backend.paging import D_QK, D_V

WORKSPACE_BYTES = 128 << 20  # FlashInfer's own recommendation

_workspaces: dict[torch.device, torch.Tensor] = {}  # scratch of calls that run one after another


@dataclass(eq=False)
class FlashInferPlan:
    """What FlashInfer is told about one step, and its wrappers by dtype and softmax scale."""

    query_offsets: torch.Tensor  # [B + 1] int32 on the host
    page_offsets: torch.Tensor  # [B + 1] int32 on the host
    pages: torch.Tensor  # [page_offsets[-1]] int32 page ids, request after request
    seq_lens: torch.Tensor  # [B] int32 on the host
    blind: torch.Tensor | None  # [B, S_q] bool, queries that see no token; None if all see one
    h_q: int
    page_size: int
    causal: bool
    wrappers: dict[tuple[torch.dtype, float], Any] = field(default_factory=dict)

    def wrapper(self, dtype: torch.dtype, softmax_scale: float) -> Any:
        key = (dtype, softmax_scale)
        if key not in self.wrappers:
            from flashinfer.mla import BatchMLAPagedAttentionWrapper

            device = self.pages.device
            if device not in _workspaces:
                _workspaces[device] = torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device=device)
            wrapper = BatchMLAPagedAttentionWrapper(_workspaces[device])
            wrapper.plan(
                self.query_offsets,
                self.page_offsets,
                self.pages,
                self.seq_lens,
                self.h_q,
                D_V,
                D_QK - D_V,
                self.page_size,
                self.causal,
                softmax_scale,
                dtype,
                dtype,
            )
            self.wrappers[key] = wrapper
        return self.wrappers[key]


def plan(
    seq_lens: torch.Tensor, block_table: torch.Tensor, *, s_q: int, h_q: int, h_kv: int, page_size: int, causal: bool
) -> FlashInferPlan:
    """Arguments as in `flashmla_backend.plan_decode`, which checked them."""
    if h_kv != 1:
        raise Unsupported(f"h_kv is {h_kv}; accepted by FlashInfer, which serves {seq_lens.device}: 1")
    lengths = seq_lens.cpu()
    counts = (lengths + page_size - 1) // page_size
    page_offsets = torch.zeros(len(lengths) + 1, dtype=torch.int32)
    torch.cumsum(counts, 0, dtype=torch.int32, out=page_offsets[1:])
    used = torch.arange(block_table.shape[1]) < counts[:, None]  # [B, W]
    visible = lengths[:, None] - (s_q - 1 - torch.arange(s_q) if causal else torch.zeros(s_q, dtype=torch.int64))
    blind = visible <= 0  # [B, S_q]
    return FlashInferPlan(
        query_offsets=torch.arange(0, len(lengths) * s_q + 1, s_q, dtype=torch.int32),
        page_offsets=page_offsets,
        pages=block_table[used.to(block_table.device)],
        seq_lens=lengths,
        blind=blind.to(seq_lens.device) if bool(blind.any()) else None,
        h_q=h_q,
        page_size=page_size,
        causal=causal,
    )


def decode(
    q: torch.Tensor,  # [B, S_q, H_q, 576] bf16 / fp16
    kv_cache: torch.Tensor,  # [P, page_size, 1, 576] same dtype
    made: FlashInferPlan,
    softmax_scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """out [B, S_q, H_q, 512] in q's dtype, lse [B, S_q, H_q] fp32 (-inf where a query sees no token)."""
    batch, s_q, h_q, _ = q.shape
    if batch == 0:
        return q.new_empty((0, s_q, h_q, D_V)), q.new_empty((0, s_q, h_q), dtype=torch.float32)
    tokens, cache = q.flatten(0, 1), kv_cache.squeeze(2)
    out, log2_sum = made.wrapper(q.dtype, softmax_scale).run(
        tokens[..., :D_V], tokens[..., D_V:], cache[..., :D_V], cache[..., D_V:], return_lse=True
    )
    out, lse = out.unflatten(0, (batch, s_q)), (log2_sum * math.log(2)).unflatten(0, (batch, s_q))
    if made.blind is not None:
        out = out.masked_fill(made.blind[..., None, None], 0.0)
        lse = lse.masked_fill(made.blind[..., None], float("-inf"))
    return out, lse
