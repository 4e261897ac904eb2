"""Once a step: the decoding requests of the batch become one plan, which every layer then follows."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import version
from typing import Any, ClassVar

import torch
from vllm.logger import init_logger
from vllm.model_executor.layers.attention.mla_attention import (
    MLACommonDecodeMetadata,
    MLACommonMetadata,
    MLACommonMetadataBuilder,
    QueryLenSupport,
)
from vllm.v1.attention.backend import AttentionCGSupport

from flashmla_backend import DecodePlan, plan_decode

from . import LOGGER_NAME, compat

logger = init_logger(LOGGER_NAME)


@dataclass
class FlashMLADecodeMetadata(MLACommonDecodeMetadata):
    """The decoding requests of a step, with the plan of their attention."""

    plan: DecodePlan


class FlashMLAMetadataBuilder(MLACommonMetadataBuilder[MLACommonMetadata[FlashMLADecodeMetadata]]):
    """Plans the decode of each step; the rest of the metadata is vLLM's."""

    _cudagraph_support: ClassVar[AttentionCGSupport] = AttentionCGSupport.UNIFORM_BATCH
    query_len_support: ClassVar[QueryLenSupport] = QueryLenSupport.UNIFORM
    reorder_batch_threshold: int = 1  # vLLM raises it to 1 + drafts when it speculates

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device):
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        logger.info_once(
            "flashmla_backend %s serves MLA decode: CPU reference path, %d-token pages",
            version("flashmla_backend"),
            self.page_size,
        )

    def _build_decode(
        self,
        block_table_tensor: torch.Tensor,  # [B, W] int32
        seq_lens_device: torch.Tensor,  # [B] int32, 0 for rows of padding
        query_start_loc_cpu: torch.Tensor,  # [B + 1] int32
        dcp_tot_seq_lens_device: torch.Tensor | None,
        **_: Any,
    ) -> FlashMLADecodeMetadata:
        plan = plan_decode(
            seq_lens_device,
            block_table_tensor,
            s_q=compat.uniform_query_len(query_start_loc_cpu),
            h_q=self.num_heads,
            page_size=self.page_size,
            causal=True,
        )
        return FlashMLADecodeMetadata(block_table_tensor, seq_lens_device, dcp_tot_seq_lens_device, plan)
