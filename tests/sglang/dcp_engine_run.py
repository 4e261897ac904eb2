"""engine_run.py as on GPUs, for DCP, which SGLang refuses on CPUs: its Triton kernels run in Triton's interpreter."""

from __future__ import annotations

import sys
from typing import Any
from unittest.mock import patch

from engine_run import main
from sglang.srt.distributed import parallel_state
from sglang.srt.layers.attention import triton_backend  # before is_cuda() lies
from sglang.srt.mem_cache.memory_pool import KVWriteLoc
from sglang.srt.model_executor.forward_context import get_token_to_kv_pool
from sglang.srt.models.deepseek_common import attention_backend_handler  # noqa: F401
from sglang.srt.models.deepseek_common.attention_forward_methods.forward_mha import DeepseekMHAForwardMixin

parallel_state.is_cuda = lambda: True  # asked where the groups of DCP are made, only
parallel_state._is_cpu = True  # torch's collectives; False also on CPUs without AMX

with patch("sglang.srt.utils.is_cuda", lambda: True):
    from flashmla_backend.integration.sglang import prefill
assert prefill.PrefillBackend.__mro__[1] is triton_backend.TritonAttnBackend


def write_parts(self: Any, latent_cache: Any, kv_a: Any, k_pe: Any, forward_batch: Any) -> None:
    """SGLang's write of a prompt's rows on GPUs."""
    slots = KVWriteLoc.for_batch(forward_batch)
    get_token_to_kv_pool().set_mla_kv_buffer(self.attn_mha, slots, kv_a.unsqueeze(1), k_pe)


DeepseekMHAForwardMixin._set_mla_kv_buffer = write_parts

if __name__ == "__main__":
    main(*sys.argv[1:])
