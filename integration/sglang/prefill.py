"""What serves prompts: SGLang's own Triton backend, and on the CPU, where Triton does not run, its torch backend.

Under DCP, which SGLang has on GPUs only, prompts read the tokens that its models gathered of all ranks.
"""

from __future__ import annotations

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

    def dispatch(attn: Any, forward_batch: Any) -> Any:
        """Absorbed attention always: the torch backend finds keys and values in the latent cache only."""
        return AttnForwardMethod.MLA
