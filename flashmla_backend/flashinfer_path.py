"""MLA decode through FlashInfer, for NVIDIA GPUs that our kernels do not run on (sm_80, sm_86, sm_89, ...).

FlashInfer plans on the host: it copies the lengths there once a step, which waits for the GPU, and a plan cannot be
made while a CUDA graph is captured. (Interface: flashinfer.mla.BatchMLAPagedAttentionWrapper, read in 0.6.14 and 0.7.2;
its arguments go by name, since 0.7 warns of positional ones.)
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch

from flashmla_backend.errors import Unsupported
from flashmla_backend.paging import D_QK, D_V

WORKSPACE_BYTES = 128 << 20  # FlashInfer's own recommendation
TILE_ROWS = 128  # query rows of FlashInfer's largest tile

_workspaces: dict[torch.device, torch.Tensor] = {}  # scratch of calls that run one after another


@dataclass(eq=False)
class FlashInferPlan:
    """What FlashInfer is told about one step, and its wrappers by dtype and softmax scale."""

    query_offsets: torch.Tensor  # [R + 1] int32 on the host, R requests as FlashInfer sees them
    page_offsets: torch.Tensor  # [R + 1] int32 on the host
    pages: torch.Tensor  # [page_offsets[-1]] int32 page ids, request after request
    seq_lens: torch.Tensor  # [R] int32 on the host
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
            is_hopper = torch.cuda.get_device_capability(device) == (9, 0)
            # Not "auto": newer releases may then choose kernels that return no log-sum-exp.
            wrapper = BatchMLAPagedAttentionWrapper(_workspaces[device], backend="fa3" if is_hopper else "fa2")
            wrapper.plan(
                qo_indptr=self.query_offsets,
                kv_indptr=self.page_offsets,
                kv_indices=self.pages,
                kv_len_arr=self.seq_lens,
                num_heads=self.h_q,
                head_dim_ckv=D_V,
                head_dim_kpe=D_QK - D_V,
                page_size=self.page_size,
                causal=self.causal,
                sm_scale=softmax_scale,
                q_data_type=dtype,
                kv_data_type=dtype,
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
    visible = lengths[:, None] - (s_q - 1 - torch.arange(s_q) if causal else torch.zeros(s_q, dtype=torch.int64))
    blind = visible <= 0  # [B, S_q]
    if causal and TILE_ROWS % h_q:
        # A tile that ends amid a query's heads: FlashInfer may leave out the last token that this query sees (0.7.2
        # refuses such plans). So each query becomes a request of its own, which needs no mask.
        lengths = visible.clamp(min=0).flatten().int()
        block_table, s_q, causal = block_table.repeat_interleave(s_q, dim=0), 1, False
    counts = (lengths + page_size - 1) // page_size
    page_offsets = torch.zeros(len(lengths) + 1, dtype=torch.int32)
    torch.cumsum(counts, 0, dtype=torch.int32, out=page_offsets[1:])
    used = torch.arange(block_table.shape[1]) < counts[:, None]  # [R, W]
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
    q_latent: torch.Tensor,  # [B, S_q, H_q, 512] bf16 / fp16
    q_rope: torch.Tensor,  # [B, S_q, H_q, 64] same dtype
    kv_cache: torch.Tensor,  # [P, page_size, 1, 576] same dtype
    made: FlashInferPlan,
    softmax_scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """out [B, S_q, H_q, 512] in q's dtype, lse [B, S_q, H_q] fp32 (-inf where a query sees no token)."""
    batch, s_q, h_q, _ = q_latent.shape
    if batch == 0:
        return q_latent.new_empty((0, s_q, h_q, D_V)), q_latent.new_empty((0, s_q, h_q), dtype=torch.float32)
    cache = kv_cache.squeeze(2)
    out, log2_sum = made.wrapper(q_latent.dtype, softmax_scale).run(
        q_nope=q_latent.flatten(0, 1),
        q_pe=q_rope.flatten(0, 1),
        ckv_cache=cache[..., :D_V],
        kpe_cache=cache[..., D_V:],
        return_lse=True,
    )
    out, lse = out.unflatten(0, (batch, s_q)), (log2_sum * math.log(2)).unflatten(0, (batch, s_q))
    if made.blind is not None:
        out = out.masked_fill(made.blind[..., None, None], 0.0)
        lse = lse.masked_fill(made.blind[..., None], float("-inf"))
    return out, lse
