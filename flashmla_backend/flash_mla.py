"""Drop-in for DeepSeek's `flash_mla` module: the same names, argument order and results.

    from flashmla_backend.flash_mla import flash_mla_with_kvcache, get_mla_metadata

Both generations of callers work: those that compute a metadata tensor and `num_splits` once a step and pass the pair
to every layer, and those that pass an opaque object which the first call fills.
(Interface: github.com/deepseek-ai/FlashMLA, flash_mla/flash_mla_interface.py.)
"""

from __future__ import annotations

from collections.abc import MutableMapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.utils.weak import WeakIdKeyDictionary

from flashmla_backend import bounds, ops
from flashmla_backend.api import check_positive_int, mla_decode, plan_decode
from flashmla_backend.dispatch import default_num_sms, path_of
from flashmla_backend.errors import InvalidArgument, Unsupported
from flashmla_backend.paging import D_QK, D_V, check_block_table, check_lengths, describe
from flashmla_backend.plan import DecodePlan
from flashmla_backend.schedule import max_items, num_parts, row_tiles_of
from flashmla_backend.workspace import make_workspaces

METADATA_COLUMNS = 8

Workspaces = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # partial_out, partial_lse and rooms of a plan

# By the storage of the metadata, since engines hand every layer a new view of it, and by shape: a captured CUDA graph
# goes on using the workspaces it saw. They go with the storage.
_workspaces: MutableMapping[torch.UntypedStorage, dict[tuple[int, int, int], Workspaces]] = WeakIdKeyDictionary()


@dataclass
class FlashMLASchedMeta:
    """Opaque step metadata of the newer interface: empty until the first layer's call fills it."""

    plan: DecodePlan | None = None


def get_mla_metadata(
    cache_seqlens: torch.Tensor | None = None,
    num_q_tokens_per_head_k: int | None = None,
    num_heads_k: int | None = None,
    num_heads_q: int | None = None,
    is_fp8_kvcache: bool = False,
    topk: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor] | tuple[FlashMLASchedMeta, None]:
    """Metadata of one decode step.

    Args:
        cache_seqlens: [B] int32. Without it an empty `FlashMLASchedMeta` is returned, filled at first use.
        num_q_tokens_per_head_k: s_q * h_q / h_k, query rows per KV head.
        num_heads_k: KV heads.
        num_heads_q: only for sparse attention, not used here.
        is_fp8_kvcache, topk: must be False and None.

    Returns:
        (tile_scheduler_metadata [N, 8] int32, num_splits [B + 1] int32), shapes depending on B and the heads alone, so
        that both can be copied into persistent buffers; or (FlashMLASchedMeta, None).
    """
    refuse_unsupported(is_fp8_kvcache=is_fp8_kvcache, topk=topk)
    if cache_seqlens is None:
        return FlashMLASchedMeta(), None
    if cache_seqlens.dim() != 1 or cache_seqlens.dtype != torch.int32:
        raise InvalidArgument(f"cache_seqlens is {describe(cache_seqlens)}; accepted: [B] int32")
    if num_q_tokens_per_head_k is None or num_heads_k is None:
        raise InvalidArgument("num_q_tokens_per_head_k and num_heads_k are needed together with cache_seqlens")
    check_positive_int("num_q_tokens_per_head_k", num_q_tokens_per_head_k)
    check_positive_int("num_heads_k", num_heads_k)
    row_tiles = row_tiles_of(num_q_tokens_per_head_k, num_heads_k)
    check_pair_style(cache_seqlens.device)
    num_sms = default_num_sms(cache_seqlens.device)
    items, part_offsets, split_offsets = ops.schedule(
        cache_seqlens, row_tiles, num_sms, num_q_tokens_per_head_k * num_heads_k
    )
    flat = torch.cat([items.flatten(), part_offsets, split_offsets])
    metadata = flat.new_zeros(metadata_rows(flat.numel()), METADATA_COLUMNS)
    metadata.view(-1)[: flat.numel()] = flat
    # DeepSeek counts an uncut request as one split, the plan as none.
    num_splits = torch.zeros_like(split_offsets)
    num_splits[1:] = split_offsets.diff().clamp(min=1).cumsum(0)
    return metadata, num_splits


def flash_mla_with_kvcache(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    block_table: torch.Tensor,
    cache_seqlens: torch.Tensor,
    head_dim_v: int,
    tile_scheduler_metadata: torch.Tensor | FlashMLASchedMeta,
    num_splits: torch.Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    is_fp8_kvcache: bool = False,
    indices: torch.Tensor | None = None,
    attn_sink: torch.Tensor | None = None,
    extra_k_cache: torch.Tensor | None = None,
    extra_indices_in_kvcache: torch.Tensor | None = None,
    topk_length: torch.Tensor | None = None,
    extra_topk_length: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Absorbed MLA decode over a paged cache.

    Args:
        q: [B, S_q, H_q, 576] bf16 or fp16, on the CPU also fp32.
        k_cache: [P, page_size, H_k, 576], q's dtype.
        block_table: [B, W] int32.
        cache_seqlens: [B] int32, the lengths that the metadata was made from.
        head_dim_v: 512.
        tile_scheduler_metadata, num_splits: what `get_mla_metadata` returned, either style.
        softmax_scale: 576 ** -0.5 if None.
        causal: bottom-right mask; False, as in DeepSeek's module, lets every query see every token.
        is_fp8_kvcache, indices .. extra_topk_length: FP8 and sparse attention; must be left at their defaults.
        out: [B, S_q, H_q, 512] to write into.

    Returns:
        out [B, S_q, H_q, 512] in q's dtype and lse [B, H_q, S_q] fp32; a query that sees no token has out 0, lse +inf.

    Raises:
        InvalidArgument: naming the argument. Unsupported: FP8 or sparse attention asked for.
    """
    refuse_unsupported(
        is_fp8_kvcache=is_fp8_kvcache,
        indices=indices,
        attn_sink=attn_sink,
        extra_k_cache=extra_k_cache,
        extra_indices_in_kvcache=extra_indices_in_kvcache,
        topk_length=topk_length,
        extra_topk_length=extra_topk_length,
    )
    if head_dim_v != D_V:
        raise InvalidArgument(f"head_dim_v is {head_dim_v}; accepted: {D_V}")
    if q.dim() != 4 or k_cache.dim() != 4:
        raise InvalidArgument(
            f"q is {describe(q)}, k_cache {describe(k_cache)}; accepted: [B, S_q, H_q, {D_QK}] and "
            f"[P, page_size, H_k, {D_QK}]"
        )
    if isinstance(tile_scheduler_metadata, FlashMLASchedMeta):
        plan = plan_from_object(tile_scheduler_metadata, q, k_cache, block_table, cache_seqlens, causal)
    else:
        plan = plan_from_pair(tile_scheduler_metadata, num_splits, q, k_cache, block_table, cache_seqlens, causal)
    scale = D_QK**-0.5 if softmax_scale is None else softmax_scale
    result, lse = mla_decode(q, k_cache, plan, softmax_scale=scale)
    if out is not None:
        if out.shape != result.shape or out.dtype != result.dtype:
            raise InvalidArgument(f"out is {describe(out)}; accepted: {describe(result)}")
        result = out.copy_(result)
    return result, lse.masked_fill(lse == float("-inf"), float("inf")).transpose(1, 2).contiguous()


def plan_from_object(
    metadata: FlashMLASchedMeta,
    q: torch.Tensor,
    k_cache: torch.Tensor,
    block_table: torch.Tensor,
    cache_seqlens: torch.Tensor,
    causal: bool,
) -> DecodePlan:
    shape: dict[str, Any] = {
        "s_q": q.shape[1],
        "h_q": q.shape[2],
        "h_kv": k_cache.shape[2],
        "page_size": k_cache.shape[1],
    }
    if metadata.plan is None:
        metadata.plan = plan_decode(cache_seqlens, block_table, causal=causal, num_pages=k_cache.shape[0], **shape)
        return metadata.plan
    made_for = {name: getattr(metadata.plan, name) for name in shape} | {"causal": metadata.plan.causal}
    if made_for != shape | {"causal": causal} or metadata.plan.batch != q.shape[0]:
        raise InvalidArgument(
            f"tile_scheduler_metadata was filled by a call with batch {metadata.plan.batch}, {made_for}; this one has "
            f"batch {q.shape[0]}, {shape | {'causal': causal}}; accepted: one object per step and shape"
        )
    check_block_table(block_table, cache_seqlens, metadata.plan.page_size)
    if metadata.plan.bounds is None:
        check_lengths(block_table, cache_seqlens, metadata.plan.page_size)
    return replace(metadata.plan, seq_lens=cache_seqlens, block_table=block_table)


def plan_from_pair(
    metadata: torch.Tensor,
    num_splits: torch.Tensor | None,
    q: torch.Tensor,
    k_cache: torch.Tensor,
    block_table: torch.Tensor,
    cache_seqlens: torch.Tensor,
    causal: bool,
) -> DecodePlan:
    if num_splits is None:
        raise InvalidArgument(
            "num_splits is None; accepted: the tensor that get_mla_metadata returned with the metadata"
        )
    s_q, h_q, page_size, h_kv = q.shape[1], q.shape[2], k_cache.shape[1], k_cache.shape[2]
    check_block_table(block_table, cache_seqlens, page_size)
    check_lengths(block_table, cache_seqlens, page_size)
    check_pair_style(cache_seqlens.device)
    batch = cache_seqlens.shape[0]
    parts = num_parts(default_num_sms(cache_seqlens.device), row_tiles_of(s_q * h_q // h_kv, h_kv))
    sizes = [max_items(batch, parts) * 4, parts + 1, batch + 1]
    expected = (metadata_rows(sum(sizes)), METADATA_COLUMNS)
    if tuple(metadata.shape) != expected or metadata.dtype != torch.int32 or num_splits.shape != (batch + 1,):
        raise InvalidArgument(
            f"tile_scheduler_metadata is {describe(metadata)}, num_splits {describe(num_splits)}: made for other "
            f"shapes; accepted for this call: {list(expected)} and {[batch + 1]} int32"
        )
    items, part_offsets, split_offsets = metadata.view(-1)[: sum(sizes)].split(sizes)
    return DecodePlan(
        cache_seqlens,
        block_table,
        items.view(-1, 4),
        part_offsets,
        split_offsets,
        *workspaces_of(metadata, part_offsets, s_q * h_q // h_kv, h_kv),
        s_q,
        h_q,
        h_kv,
        page_size,
        causal,
    )


def workspaces_of(metadata: torch.Tensor, part_offsets: torch.Tensor, rows: int, h_kv: int) -> Workspaces:
    """Shared by calls with metadata in the same storage, which must therefore run one after another."""
    held = _workspaces.setdefault(metadata.untyped_storage(), {})
    shape = (part_offsets.shape[0], rows, h_kv)
    if shape not in held:
        held[shape] = make_workspaces(path_of(metadata.device), part_offsets, rows, h_kv)
    return held[shape]


def check_pair_style(device: torch.device) -> None:
    if path_of(device) == "flashinfer":
        raise Unsupported(
            f"FlashInfer serves {device}, and its plans are no tensors: call get_mla_metadata() without arguments and "
            "pass the object it returns"
        )
    if bounds.enabled():
        raise Unsupported(
            f"{bounds.VARIABLE}=1 was set: metadata tensors are made without a block table, so there is nothing to "
            "check; call get_mla_metadata() without arguments and pass the object it returns, or unset the variable"
        )


def metadata_rows(numbers: int) -> int:
    return -(-numbers // METADATA_COLUMNS)


def refuse_unsupported(**arguments: object) -> None:
    for name, value in arguments.items():
        if value is not None and value is not False:
            raise Unsupported(
                f"{name} was given: FP8 caches and sparse attention are not supported; leave it at its default and "
                "pass a bf16, fp16 or fp32 cache"
            )
