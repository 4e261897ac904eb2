"""Split-KV decode in torch, through the same schedule and the same tiles as the device kernels.

Every work item yields a partial result (o normalised by its own softmax sum, and its log-sum-exp); requests that were
cut are merged by the combine step. In batch-invariant mode (see `leaves`) both work leaf by leaf. Inputs may be bf16,
fp16 or fp32; the arithmetic is fp32.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch

from flashmla_backend.errors import InvalidArgument
from flashmla_backend.leaves import leaves_of, merge_tree
from flashmla_backend.paging import D_V, PagedKV, check_page_ids, present_as_tiles
from flashmla_backend.schedule import TILE_TOKENS, pages_of


def decode(
    q: torch.Tensor,  # [B, S_q, H_q, 576] bf16 / fp16 / fp32
    kv_cache: torch.Tensor,  # [P, page_size, H_kv, 576] same dtype
    block_table: torch.Tensor,  # [B, W] int32
    seq_lens: torch.Tensor,  # [B] int32
    items: torch.Tensor,  # [max_items, 4] int32: request, page_begin, page_end, split; unused rows are -1
    split_offsets: torch.Tensor,  # [B + 1] int32
    softmax_scale: float,
    causal: bool,
    max_leaves: int,  # batch-invariant mode: of a request; 0 is free mode
) -> tuple[torch.Tensor, torch.Tensor]:
    """out [B, S_q, H_q, 512] in q's dtype, lse [B, S_q, H_q] fp32 (-inf where a query sees no token)."""
    batch, s_q = q.shape[:2]
    h_kv = kv_cache.shape[2]
    work = [item for item in items.tolist() if item[0] >= 0]
    lengths: list[int] = seq_lens.tolist()
    offsets: list[int] = split_offsets.tolist()
    check_page_ids(block_table, seq_lens, kv_cache.shape[1], kv_cache.shape[0])
    paged = present_as_tiles(kv_cache, block_table)
    q_rows = group_by_kv_head(q, h_kv)  # [B, H_kv, rows, 576]
    rows = q_rows.shape[2]

    out = torch.empty(batch, h_kv, rows, D_V)
    lse = torch.empty(batch, h_kv, rows)
    partial_out = torch.empty(offsets[-1], h_kv, rows, D_V)
    partial_lse = torch.empty(offsets[-1], h_kv, rows)
    for request, page_begin, page_end, split in work:
        length = lengths[request]
        spans = [(page_begin, page_end)]
        if max_leaves:
            spans = leaves_of(pages_of(length), page_begin, page_end, max_leaves)
        o, logsum = merge_tree(
            [
                attend(q_rows[request], paged, request, pages, length, softmax_scale, s_q if causal else 0)
                for pages in spans
            ]
        )
        if split < 0:
            out[request], lse[request] = o, logsum
        else:
            partial_out[split], partial_lse[split] = o, logsum
    for request, (first, last) in enumerate(pairwise(offsets)):
        if last > first:
            partials = partial_out[first:last], partial_lse[first:last]
            if max_leaves:
                out[request], lse[request] = merge_tree(list(zip(*partials, strict=True)))
            else:
                out[request], lse[request] = combine(*partials)
    return (
        ungroup(out, s_q).to(q.dtype),
        ungroup(lse[..., None], s_q).squeeze(-1),
    )


def decode_ragged(
    q: torch.Tensor,  # [T, H_q, 576]
    query_offsets: torch.Tensor,  # [B + 1] int32, requests being query tiles of at most s_q tokens
    s_q: int,
    decode_uniform: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]],  # `decode` but for q
) -> tuple[torch.Tensor, torch.Tensor]:
    """out [T, H_q, 512], lse [T, H_q]: as requests of s_q query tokens, of which the last ones count."""
    real = torch.arange(s_q) >= s_q - query_offsets.diff()[:, None]  # [B, S_q]
    padded = q.new_zeros(*real.shape, *q.shape[1:])
    padded[real] = q
    out, lse = decode_uniform(padded)
    return out[real], lse[real]


def attend(
    q: torch.Tensor,  # [H_kv, rows, 576] fp32, row = query token * group + head
    paged: PagedKV,
    request: int,
    pages: tuple[int, int],
    length: int,
    softmax_scale: float,
    causal_queries: int,  # S_q under the bottom-right causal mask, 0 without a mask
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention over the tokens of one work item: o [H_kv, rows, 512], lse [H_kv, rows], both fp32."""
    begin = pages[0] * TILE_TOKENS
    end = max(begin, min(pages[1] * TILE_TOKENS, length))
    kv = paged.gather(request, begin, end).float().transpose(0, 1)  # [H_kv, tokens, 576]
    scores = (q @ kv.transpose(1, 2)) * softmax_scale  # [H_kv, rows, tokens]
    if causal_queries:
        group = q.shape[1] // causal_queries
        query = torch.arange(q.shape[1]) // group
        token = torch.arange(begin, end)
        scores.masked_fill_(token > length - causal_queries + query[:, None], float("-inf"))
    lse = torch.logsumexp(scores, dim=-1)
    # A row that sees no token has lse -inf: subtracting 0 instead keeps its weights 0 rather than NaN.
    weights = torch.exp(scores - lse.masked_fill(lse == float("-inf"), 0.0)[..., None])
    return weights @ kv[..., :D_V], lse


def combine(o: torch.Tensor, lse: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Merge partial results of one request: o [splits, H_kv, rows, 512], lse [splits, H_kv, rows]."""
    total = torch.logsumexp(lse, dim=0)
    weights = torch.exp(lse - total.masked_fill(total == float("-inf"), 0.0))
    return torch.einsum("shr,shrd->hrd", weights, o), total


def check_plan_covers(items: torch.Tensor, seq_lens: torch.Tensor) -> None:
    """The schedule must read exactly the pages that the lengths ask for.

    items: [max_items, 4] int32 and seq_lens: [B] int32, as in `decode`.
    """
    lengths = seq_lens.tolist()
    planned = [0] * len(lengths)
    for request, page_begin, page_end, _ in items.tolist():
        if request >= 0:
            planned[request] += page_end - page_begin
    for request, (pages, length) in enumerate(zip(planned, lengths, strict=True)):
        needed = pages_of(length)
        if pages != needed:
            raise InvalidArgument(
                f"plan was made for other lengths: it reads {pages} pages of request {request}, whose seq_lens of "
                f"{length} tokens needs {needed}; call plan_decode again whenever seq_lens changes"
            )


def group_by_kv_head(q: torch.Tensor, h_kv: int) -> torch.Tensor:
    """[B, S_q, H_q, D] -> [B, H_kv, S_q * H_q / H_kv, D] fp32, query tokens outermost within a KV head."""
    batch, s_q, h_q, width = q.shape
    grouped = q.reshape(batch, s_q, h_kv, h_q // h_kv, width).transpose(1, 2)
    return grouped.reshape(batch, h_kv, s_q * (h_q // h_kv), width).float()


def ungroup(x: torch.Tensor, s_q: int) -> torch.Tensor:
    """[B, H_kv, rows, D] -> [B, S_q, H_q, D], the inverse of `group_by_kv_head`."""
    batch, h_kv, rows, width = x.shape
    by_token = x.reshape(batch, h_kv, s_q, rows // s_q, width).transpose(1, 2)
    return by_token.reshape(batch, s_q, h_kv * (rows // s_q), width)
