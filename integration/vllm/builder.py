"""Once a step: the decoding requests of the batch become one plan, which every layer then follows.

CUDA graphs keep addresses, so nothing that a layer reads may move between steps. vLLM sees to it for lengths and block
tables, which lie in tensors of its model runner; the planner for the plan and the workspace.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
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

from flashmla_backend.api import DecodePlan
from flashmla_backend.dispatch import NAMES, path_of

from ..planner import StepPlanner
from . import LOGGER_NAME

logger = init_logger(LOGGER_NAME)


@dataclass
class FlashMLADecodeMetadata(MLACommonDecodeMetadata):
    """The decoding requests of a step."""

    plan_step: Callable[..., DecodePlan]
    planned: DecodePlan | None = field(default=None, init=False)

    def plan(self, num_pages: int) -> DecodePlan:
        """Made when the first layer asks, so that a CUDA graph of the layers holds the planning too.

        num_pages: of the cache, the same for all layers.

        A replayed graph then follows the lengths it finds, and vLLM may replay one without building metadata first, as
        it does for drafts. It captures with metadata that no layer has asked yet.
        """
        if self.planned is None:
            self.planned = self.plan_step(num_pages=num_pages)
        return self.planned


class FlashMLAMetadataBuilder(MLACommonMetadataBuilder[MLACommonMetadata[FlashMLADecodeMetadata]]):
    """Plans the decode of each step; the rest of the metadata is vLLM's."""

    _cudagraph_support: ClassVar[AttentionCGSupport] = AttentionCGSupport.UNIFORM_BATCH
    query_len_support: ClassVar[QueryLenSupport] = QueryLenSupport.UNIFORM
    reorder_batch_threshold: int = 1  # vLLM raises it to 1 + drafts when it speculates

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device):
        from vllm.envs import VLLM_BATCH_INVARIANT  # read from the environment when it is asked for

        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        heads = self.num_heads * self.dcp_world_size  # DCP splits the tokens among its ranks and gathers their heads
        self.planner = StepPlanner(
            device,
            h_q=heads,
            page_size=self.page_size,
            longest_query=self.reorder_batch_threshold,
            logger=logger,
            batch_invariant=VLLM_BATCH_INVARIANT,
        )
        logger.info_once(
            "flashmla_backend %s serves MLA decode: %s, %d-token pages, %d query heads, workspace %.0f MiB%s",
            version("flashmla_backend"),
            NAMES[path_of(device)],
            self.page_size,
            heads,
            self.planner.workspace.nbytes / 2**20,
            ", batch-invariant" if self.planner.batch_invariant else "",
        )

    def _build_decode(
        self,
        block_table_tensor: torch.Tensor,  # [B, W] int32
        seq_lens_device: torch.Tensor,  # [B] int32, 0 for rows of padding
        num_decode_tokens: int,  # B * new tokens of each, those of padding included
        dcp_tot_seq_lens_device: torch.Tensor | None,
        **_: Any,
    ) -> FlashMLADecodeMetadata:
        s_q = num_decode_tokens // seq_lens_device.shape[0]
        plan_step = self.planner.step(seq_lens_device, block_table_tensor, s_q)
        return FlashMLADecodeMetadata(
            block_table=block_table_tensor,
            seq_lens=seq_lens_device,
            dcp_tot_seq_lens=dcp_tot_seq_lens_device,
            plan_step=plan_step,
        )
