"""The traditional forms of MLA decode, in plain torch, for cross-checks and as benchmark baselines.

    expanded_mha    decompress K and V of every head, materialise all scores        (the form MLA is trained in)
    absorbed        fold W_UK into q, attend over the latent in one shot              (DeepSeek-V2, section 2.1.3)
    chunked         absorbed, a chunk of tokens at a time with an online softmax      (arXiv:1805.02867, 2112.05682)

All take contiguous tokens, one request: paging and batching are what the product adds.
"""

from __future__ import annotations

import torch

from flashmla_backend.paging import D_V


def expanded_mha(
    q_nope: torch.Tensor,  # [S_q, H, D_nope]
    q_rope: torch.Tensor,  # [S_q, H, 64]
    latent: torch.Tensor,  # [L, 512]
    k_rope: torch.Tensor,  # [L, 64]
    w_uk: torch.Tensor,  # [H, D_nope, 512]
    w_uv: torch.Tensor,  # [H, 512, D_v]
    softmax_scale: float,
    causal: bool = True,
) -> torch.Tensor:
    """Attention over decompressed keys and values: [S_q, H, D_v]."""
    k_nope = torch.einsum("lc,hdc->lhd", latent, w_uk)
    value = torch.einsum("lc,hcv->lhv", latent, w_uv)
    scores = torch.einsum("shd,lhd->shl", q_nope, k_nope) + torch.einsum("shr,lr->shl", q_rope, k_rope)
    weights = torch.softmax(mask_bottom_right(scores * softmax_scale, causal), dim=-1)
    return torch.einsum("shl,lhv->shv", weights, value)


def absorb_query(q_nope: torch.Tensor, q_rope: torch.Tensor, w_uk: torch.Tensor) -> torch.Tensor:
    """[S_q, H, D_nope], [S_q, H, 64], [H, D_nope, 512] -> the absorbed query [S_q, H, 576]."""
    return torch.cat([torch.einsum("shd,hdc->shc", q_nope, w_uk), q_rope], dim=-1)


def absorbed(
    q: torch.Tensor,  # [S_q, H, 576]
    kv: torch.Tensor,  # [L, 576]
    softmax_scale: float,
    causal: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """All scores at once over the latent cache: out [S_q, H, 512], lse [S_q, H]."""
    scores = mask_bottom_right(torch.einsum("shd,ld->shl", q, kv) * softmax_scale, causal)
    return torch.softmax(scores, dim=-1) @ kv[:, :D_V], torch.logsumexp(scores, dim=-1)


def chunked(
    q: torch.Tensor,  # [S_q, H, 576]
    kv: torch.Tensor,  # [L, 576]
    softmax_scale: float,
    causal: bool = True,
    chunk_tokens: int = 1024,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`absorbed` in memory independent of L: out [S_q, H, 512], lse [S_q, H]."""
    s_q, heads, _ = q.shape
    length = kv.shape[0]
    largest = q.new_full((s_q, heads, 1), float("-inf"))
    total = q.new_zeros((s_q, heads, 1))
    out = q.new_zeros((s_q, heads, D_V))
    for begin in range(0, length, chunk_tokens):
        chunk = kv[begin : begin + chunk_tokens]
        scores = torch.einsum("shd,ld->shl", q, chunk) * softmax_scale
        scores = mask_bottom_right(scores, causal, begin, length)
        new_largest = torch.maximum(largest, scores.amax(dim=-1, keepdim=True))
        anchor = new_largest.masked_fill(new_largest == float("-inf"), 0.0)  # no token seen so far: keep exp finite
        rescale, weights = torch.exp(largest - anchor), torch.exp(scores - anchor)
        out = out * rescale + weights @ chunk[:, :D_V]
        total = total * rescale + weights.sum(dim=-1, keepdim=True)
        largest = new_largest
    return out / total, (largest + torch.log(total)).squeeze(-1)


def mask_bottom_right(scores: torch.Tensor, causal: bool, begin: int = 0, length: int | None = None) -> torch.Tensor:
    """Hide tokens after each query's own position; scores [S_q, H, tokens] are of tokens `begin` onwards."""
    if not causal:
        return scores
    s_q, _, tokens = scores.shape
    last = (tokens if length is None else length) - s_q + torch.arange(s_q, device=scores.device)
    token = begin + torch.arange(tokens, device=scores.device)
    return scores.masked_fill(token > last[:, None, None], float("-inf"))
