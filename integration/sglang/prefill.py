"""What serves prompts: SGLang's own Triton backend, and on the CPU, where Triton does not run, its torch backend."""

from __future__ import annotations

from typing import Any

from sglang.srt.models.deepseek_common.attention_backend_handler import handle_attention_triton
from sglang.srt.models.deepseek_common.attention_forward_methods.forward_methods import AttnForwardMethod
from sglang.srt.utils import is_cuda

if is_cuda():
    from sglang.srt.layers.attention.triton_backend import TritonAttnBackend as PrefillBackend

    # Prompts without a cached prefix run unabsorbed, with heads of 192 and 128 columns.
    dispatch = handle_attention_triton
else:
    from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend

    class TorchPrefill(TorchNativeAttnBackend):
        """SGLang's torch backend with the constructor of its Triton backend."""

        def __init__(self, model_runner: Any, skip_prefill: bool = False) -> None:
            super().__init__(model_runner)

    PrefillBackend = TorchPrefill

    def dispatch(attn: Any, forward_batch: Any) -> Any:
        """Absorbed attention always: the torch backend finds keys and values in the latent cache only."""
        return AttnForwardMethod.MLA
