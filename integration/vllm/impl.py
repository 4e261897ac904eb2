"""Each layer of each step: new rows into the cache, then attention over it."""

from __future__ import annotations

from typing import Any

import torch
from vllm.model_executor.layers.attention.mla_attention import MLACommonImpl, MLACommonMetadata
from vllm.v1.attention.backend import AttentionType

from flashmla_backend import mla_decode
from flashmla_backend.errors import Unsupported
from flashmla_backend.paging import D_V

from .builder import FlashMLADecodeMetadata


class FlashMLAImpl(MLACommonImpl[MLACommonMetadata[FlashMLADecodeMetadata]]):
    """Decode of one layer through flashmla_backend; prefill and the projections around it are vLLM's."""

    can_return_lse_for_decode: bool = True
    supports_dcp: bool = True

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int,
        alibi_slopes: list[float] | None,
        sliding_window: int | None,
        kv_cache_dtype: str,
        logits_soft_cap: float | None,
        attn_type: str,
        kv_sharing_target_layer_name: str | None,
        **mla_args: Any,
    ) -> None:
        wanted = {
            "alibi_slopes": alibi_slopes,
            "sliding_window": sliding_window,
            "logits_soft_cap": logits_soft_cap,
            "attn_type": None if attn_type == AttentionType.DECODER else attn_type,
        }
        for name, value in wanted.items():
            if value is not None:
                raise Unsupported(
                    f"the model asks for {name}={value!r}, which flashmla has not; "
                    "drop --attention-backend flashmla to let vLLM choose"
                )
        super().__init__(
            num_heads,
            head_size,
            scale,
            num_kv_heads,
            alibi_slopes,
            sliding_window,
            kv_cache_dtype,
            logits_soft_cap,
            attn_type,
            kv_sharing_target_layer_name,
            **mla_args,
        )

    def forward_mqa(
        self,
        q: torch.Tensor | tuple[torch.Tensor, torch.Tensor],
        kv_c_and_k_pe_cache: torch.Tensor,
        attn_metadata: MLACommonMetadata[FlashMLADecodeMetadata],
        layer: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Attention of the decoding requests' new tokens over all of their cache.

        q: [T, N, 576], or its parts ([T, N, 512], [T, N, 64]); T = requests x new tokens each.
        kv_c_and_k_pe_cache: [pages, 64, 576].
        Returns out [T, N, 512] and lse [T, N] fp32, natural logarithm.
        """
        decode = attn_metadata.decode
        assert decode is not None  # vLLM calls only when the batch has decoding requests
        latent, rope = q if isinstance(q, tuple) else (q[..., :D_V], q[..., D_V:])
        tokens, heads, _ = latent.shape
        plan = decode.plan(num_pages=kv_c_and_k_pe_cache.shape[0])
        if plan.query_offsets is None:
            queries = (plan.batch, plan.s_q)
            latent, rope = latent.unflatten(0, queries), rope.unflatten(0, queries)  # [B, S_q, N, 512 and 64]
        elif plan.num_queries < tokens:  # padding, which belongs to no request
            out, lse = latent.new_zeros(tokens, heads, D_V), latent.new_zeros(tokens, heads, dtype=torch.float32)
            real = slice(plan.num_queries)
            out[real], lse[real] = self.forward_mqa(
                (latent[real], rope[real]), kv_c_and_k_pe_cache, attn_metadata, layer
            )
            return out, lse
        out, lse = mla_decode(
            (latent, rope),
            kv_c_and_k_pe_cache.unsqueeze(2),  # [pages, 64, 1, 576]
            plan,
            softmax_scale=self.scale,
        )
        return out.view(tokens, heads, -1), lse.view(tokens, heads)

    def do_kv_cache_update(
        self,
        kv_c_normed: torch.Tensor,
        k_pe: torch.Tensor,
        kv_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
        *scales: Any,
        **more: Any,
    ) -> None:
        """Writes one row per new token.

        kv_c_normed: [T, 512]; k_pe: [T, 1, 64]; kv_cache: [pages, 64, 576], pages may lie apart.
        slot_mapping: [T] int64, page * 64 + row; -1 for padding, which is not written.
        """
        if kv_cache.device.type != "cpu":  # the CPU build of vLLM has no op for it
            super().do_kv_cache_update(kv_c_normed, k_pe, kv_cache, slot_mapping, *scales, **more)
            return
        if kv_cache.numel() == 0:  # not allocated yet: vLLM measures its memory
            return
        slots = slot_mapping.flatten()
        rows = torch.cat([kv_c_normed, k_pe.squeeze(1)], dim=-1)[: slots.numel()]  # [T, 576]
        real = slots >= 0
        slots = slots[real]
        kv_cache[slots // kv_cache.shape[1], slots % kv_cache.shape[1]] = rows[real]
