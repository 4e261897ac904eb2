"""The oracle: the only definition of a right answer. Slow, direct, and sharing no code with what it judges."""

from __future__ import annotations

import torch


def mla_decode(
    q: torch.Tensor,
    kv_cache: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    *,
    softmax_scale: float,
    causal: bool = True,
    dtype: torch.dtype = torch.float64,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Absorbed MLA decode by the textbook formula, one query token at a time (DeepSeek-V2, arXiv:2405.04434, 2.1).

    Args:
        q: [B, S_q, H_q, 576], the absorbed query (512 latent + 64 rope).
        kv_cache: [P, page_size, H_kv, 576]; V is the first 512 columns of K.
        block_table: [B, W] int32 page ids.
        seq_lens: [B] int32 tokens per request, the S_q new ones included.
        causal: query i of S_q sees tokens up to len - S_q + i.
        dtype: precision of the arithmetic.

    Returns:
        out [B, S_q, H_q, 512] and lse [B, S_q, H_q] (natural log), both in `dtype`; a query that sees no token
        has out 0 and lse -inf.
    """
    batch, s_q, h_q, _ = q.shape
    page_size, h_kv = kv_cache.shape[1], kv_cache.shape[2]
    out = torch.zeros(batch, s_q, h_q, 512, dtype=dtype, device=q.device)
    lse = torch.full((batch, s_q, h_q), float("-inf"), dtype=dtype, device=q.device)
    for b in range(batch):
        length = int(seq_lens[b])
        token = torch.arange(length, device=q.device)
        kv = kv_cache[block_table[b, token // page_size].long(), token % page_size].to(dtype)  # [L, H_kv, 576]
        queries = q[b].to(dtype).unflatten(1, (h_kv, h_q // h_kv))  # [S_q, H_kv, group, 576]
        for i in range(s_q):
            visible = min(length, length - s_q + i + 1) if causal else length
            if visible <= 0:
                continue
            scores = torch.einsum("kgd,tkd->kgt", queries[i], kv[:visible]) * softmax_scale
            lse[b, i] = torch.logsumexp(scores, dim=-1).flatten()
            out[b, i] = torch.einsum("kgt,tkd->kgd", torch.softmax(scores, dim=-1), kv[:visible, :, :512]).flatten(0, 1)
    return out, lse
