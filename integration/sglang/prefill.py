"""What serves prompts: SGLang's own Triton backend, and on the CPU, where Triton does not run, its torch backend.

Under DCP both are told of no ranks, and read the tokens that SGLang's models gathered; the rows they get are written by
FlashMLABackend.
"""

from __future__ import annotations

from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import torch
from sglang.srt.models.deepseek_common.attention_backend_handler import handle_attention_triton
from sglang.srt.models.deepseek_common.attention_forward_methods.forward_methods import AttnForwardMethod
from sglang.srt.utils import is_cuda

from .dcp import reading_gathered

if is_cuda():
    from sglang.srt.layers.attention.triton_backend import TritonAttnBackend

    class PrefillBackend(TritonAttnBackend):
        """SGLang's Triton backend. Its own DCP would have each rank attend with the queries of all."""

        def __init__(self, model_runner: Any, skip_prefill: bool = False) -> None:
            super().__init__(model_runner, skip_prefill)
            self.dcp_size, self.dcp_rank = 1, 0

        def init_forward_metadata(self, forward_batch: Any) -> None:
            super().init_forward_metadata(forward_batch)
            if forward_batch.attn_dcp_metadata is not None:
                # The requests' cached tokens lie one after the other in what is gathered, ahead of all new ones.
                indices = self.forward_metadata.kv_indices
                torch.arange(len(indices), out=indices)

        def forward_extend(self, q: Any, k: Any, v: Any, layer: Any, forward_batch: Any, *more: Any, **by: Any) -> Any:
            with reading_gathered(self, forward_batch):
                return super().forward_extend(q, k, v, layer, forward_batch, *more, **by)

    # Prompts without a cached prefix run unabsorbed, with heads of 192 and 128 columns.
    dispatch = handle_attention_triton
else:
    from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend

    class PrefillBackend(TorchNativeAttnBackend):  # type: ignore[no-redef]
        """SGLang's torch backend with the constructor of its Triton backend."""

        def __init__(self, model_runner: Any, skip_prefill: bool = False) -> None:
            super().__init__(model_runner)
            self.req_to_token_pool: Any = model_runner.req_to_token_pool

        def forward_extend(self, q: Any, k: Any, v: Any, layer: Any, forward_batch: Any, *more: Any, **by: Any) -> Any:
            table = self.req_to_token_pool
            if forward_batch.attn_dcp_metadata is not None:
                self.req_to_token_pool = SimpleNamespace(req_to_token=gathered_slots(table, forward_batch))
            try:
                with reading_gathered(self, forward_batch):
                    return super().forward_extend(q, k, v, layer, forward_batch, *more, **by)
            finally:
                self.req_to_token_pool = table

    def gathered_slots(table: Any, forward_batch: Any) -> torch.Tensor:
        """The token table with rows of what is gathered as slots of the batch's requests: [requests, context]."""
        gathered = forward_batch.attn_dcp_metadata
        slots = torch.zeros_like(table.req_to_token)
        spans = pairwise(gathered.dcp_kv_indptr.tolist())
        for request, (first, last) in zip(forward_batch.req_pool_indices.tolist(), spans, strict=True):
            slots[request, : last - first] = gathered.dcp_kv_indices[first:last]
        return slots

    def dispatch(attn: Any, forward_batch: Any) -> Any:
        """Absorbed attention always: the torch backend finds keys and values in the latent cache only."""
        return AttnForwardMethod.MLA
