"""Once a step: the decoding requests of the batch become one plan, which every layer then follows.

CUDA graphs keep addresses, so nothing that a layer reads may move between steps. vLLM sees to it for lengths and block
tables, which lie in tensors of its model runner; the planner for the plan and the workspace.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
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

from flashmla_backend.dispatch import NAMES, path_of
from flashmla_backend.plan import DecodePlan
from flashmla_backend.schedule import TILE_ROWS

from ..claim import asked_for_batch_invariance
from ..planner import StepPlanner
from . import LOGGER_NAME

logger = init_logger(LOGGER_NAME)

# Prompts, or what is left of them, of up to so many tokens are decoded: no copy of the cached context is made for them,
# and none of its keys and values for every head. docs/performance.md has the measurement.
SHORT_PREFILL = 128


def is_uniform(query_start_loc: torch.Tensor, s_q: int) -> bool:
    """Whether each request has s_q new tokens, or none, as padding has. query_start_loc: [B + 1] int32 on the CPU."""
    if torch.equal(query_start_loc, offsets_without_padding(len(query_start_loc), s_q)):
        return True
    counts = query_start_loc.diff()
    return bool(((counts == s_q) | (counts == 0)).all())


@cache
def offsets_without_padding(count: int, s_q: int) -> torch.Tensor:
    return torch.arange(count, dtype=torch.int32) * s_q


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
    query_len_support: ClassVar[QueryLenSupport] = QueryLenSupport.VARLEN
    reorder_batch_threshold: int = 1  # vLLM raises it to 1 + drafts when it speculates

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device):
        from vllm.envs import VLLM_BATCH_INVARIANT  # read from the environment when it is asked for

        invariant = VLLM_BATCH_INVARIANT or asked_for_batch_invariance()
        if invariant:  # else what a request shares a step with would decide how its queries are cut
            self.query_len_support = QueryLenSupport.UNIFORM  # type: ignore[misc]
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        heads = self.num_heads * self.dcp_world_size  # DCP splits the tokens among its ranks and gathers their heads
        self.longest_uniform = self.reorder_batch_threshold  # what CUDA graphs are captured for
        longest_query = self.longest_uniform
        if not invariant and self.dcp_world_size == 1:
            self.reorder_batch_threshold = max(self.longest_uniform, SHORT_PREFILL)
            longest_query = max(longest_query, TILE_ROWS // heads)
        self.planner = StepPlanner(
            device,
            h_q=heads,
            page_size=self.page_size,
            longest_query=longest_query,
            logger=logger,
            batch_invariant=invariant,
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
        query_start_loc_cpu: torch.Tensor,  # [B + 1] int32 offsets of new tokens; padding has none
        num_decode_tokens: int,  # with padding, if the batch is uniform
        dcp_tot_seq_lens_device: torch.Tensor | None,
        **_: Any,
    ) -> FlashMLADecodeMetadata:
        batch = seq_lens_device.shape[0]
        s_q = num_decode_tokens // batch
        if s_q * batch == num_decode_tokens and s_q <= self.longest_uniform and is_uniform(query_start_loc_cpu, s_q):
            plan_step = self.planner.step(seq_lens_device, block_table_tensor, s_q)
        else:
            plan_step = self.planner.ragged_step(seq_lens_device, block_table_tensor, query_start_loc_cpu)
        return FlashMLADecodeMetadata(
            block_table=block_table_tensor,
            seq_lens=seq_lens_device,
            dcp_tot_seq_lens=dcp_tot_seq_lens_device,
            plan_step=plan_step,
        )
