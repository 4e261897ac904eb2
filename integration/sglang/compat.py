"""Which SGLang we serve, and how its releases differ where our classes touch them.

Differences between 0.5.15 and 0.5.23, and the one place that absorbs each:

    `get_spec()` comes with 0.5.17                        speculation(), else from the server's arguments
    `attn_dcp_size` comes with 0.5.16                     dcp_share(), else from the layers' function
    LSE to base e is merged from 0.5.17 on                refusals.check_dcp() asks for USED_BY_DCP
    verify masks are asked for as buffers in 0.5.15-16    FlashMLABackend.get_verify_buffers_to_fill_after_draft
    the draft-extend backend of flashmla comes in 0.5.16  both it and the plain backend take draft-extend batches
    prefill is dispatched by name in all of them          plugin.claim_flashmla registers prefill.dispatch
    so are backends that take q and k in two parts        take_queries_in_parts() enters ours
"""

from __future__ import annotations

import inspect
from importlib import import_module
from typing import Any

from flashmla_backend.errors import Unsupported

from .. import claim
from .dcp import WHOLE, Share

OLDEST = (0, 5, 15)
NEWEST = (0, 5, 23)
OLDEST_WITH_DCP = (0, 5, 17)

_ATTENTION = "sglang.srt.layers.attention"
NAME = "flashmla"
DRAFT_MODULE = f"{_ATTENTION}.flashmla_backend"  # where draft workers import their classes from, whoever serves

# What we call or override, and the parameters that we rely on.
USED: dict[str, dict[str, tuple[str, ...]]] = {
    f"{_ATTENTION}.attention_registry": {"ATTENTION_BACKENDS": (), "create_flashmla_backend": ("runner",)},
    "sglang.srt.models.deepseek_common.attention_backend_handler": {
        "AttentionBackendRegistry.register": ("backend_name", "handler_func"),
        "handle_attention_triton": ("attn", "forward_batch"),
    },
    "sglang.srt.models.deepseek_common.attention_forward_methods.forward_methods": {"AttnForwardMethod.MLA": ()},
    "sglang.srt.models.deepseek_common.utils": {"FORWARD_ABSORB_CORE_ATTENTION_BACKENDS": ()},
    f"{_ATTENTION}.base_attn_backend": {
        "AttentionBackend.init_forward_metadata": ("forward_batch",),
        "AttentionBackend.init_forward_metadata_out_graph": ("forward_batch", "in_capture"),
        "AttentionBackend.init_forward_metadata_in_graph": ("forward_batch",),
        "AttentionBackend.init_cuda_graph_state": ("max_bs", "max_num_tokens"),
        "AttentionBackend.get_cuda_graph_seq_len_fill_value": (),
        "AttentionBackend.forward_decode": ("q", "k", "v", "layer", "forward_batch", "save_kv_cache"),
        "AttentionBackend.forward_extend": ("q", "k", "v", "layer", "forward_batch", "save_kv_cache"),
    },
    f"{_ATTENTION}.triton_backend": {"TritonAttnBackend": ("model_runner", "skip_prefill")},
    f"{_ATTENTION}.torch_native_backend": {"TorchNativeAttnBackend": ("model_runner",)},
    "sglang.srt.mem_cache.memory_pool": {
        "KVWriteLoc": ("loc",),
        "MLATokenToKVPool.set_kv_buffer": ("layer", "loc_info", "cache_k", "cache_v"),
        "MLATokenToKVPool.set_mla_kv_buffer": ("layer", "cache_k_nope", "cache_k_rope"),
        "MLATokenToKVPool.get_key_buffer": ("layer_id",),
    },
    "sglang.srt.runtime_context": {"get_parallel": ()},
}


GATHERS_FOR_DCP = "prepare_context_parallel_metadata_for_dcp"  # of models that gather cached tokens for prompts

# What DCP needs beside that, and older releases do not have.
_DCP = "sglang.srt.layers.dcp"
USED_BY_DCP: dict[str, dict[str, tuple[str, ...]]] = {
    f"{_DCP}.comm": {
        "cp_lse_ag_out_rs_mla": ("is_lse_base_on_e",),
        "all_gather_kv_cache_for_mla_extend": ("dcp_kv_buffer", "dcp_extend_prefix_lens_sum"),
    },
    f"{_DCP}.planner": {"prepare_decode_context_parallel_metadata": ("extend_prefix_lens",)},
    "sglang.srt.models.deepseek_v2": {f"DeepseekV2ForCausalLM.{GATHERS_FOR_DCP}": ("extend_prefix_lens",)},
}


def check_version(found: str) -> None:
    """Raises Unsupported unless SGLang `found` (its `__version__`) lies in OLDEST .. NEWEST."""
    claim.check_version("SGLang", found, OLDEST, NEWEST)


def check_internals(found: str) -> None:
    """Raises Unsupported if something in USED is not where, or not what, it is in the releases we know."""
    what = missing(USED)
    if what is not None:
        raise Unsupported(
            f"SGLang {found} differs from what is known of it: {what}; install a release from "
            f"{'.'.join(map(str, OLDEST))} to {'.'.join(map(str, NEWEST))} as it was published, or set "
            f"{claim.DISABLE_VARIABLE}=1"
        )


def missing(used: dict[str, dict[str, tuple[str, ...]]]) -> str | None:
    """The first thing in `used` that the installed SGLang does not have."""
    for module, names in used.items():
        for name, parameters in names.items():
            try:
                value: Any = import_module(module)
                for part in name.split("."):
                    value = getattr(value, part)
                lacking = set(parameters) - set(inspect.signature(value).parameters) if parameters else set()
            except (ImportError, AttributeError, ValueError) as problem:
                return f"{module}.{name} is gone ({problem})"
            if lacking:
                return f"{module}.{name} takes no {', '.join(sorted(lacking))}"
    return None


def query_heads(model_runner: Any) -> int:
    """Query heads of this rank; under DCP decode has those of all ranks that share a cache."""
    from sglang.srt.runtime_context import get_parallel

    heads: int = model_runner.model_config.num_attention_heads
    return heads // get_parallel().attn_tp_size


def dcp_share() -> Share:
    """What this rank caches of each request."""
    from sglang.srt.runtime_context import get_parallel

    parallel, layers = get_parallel(), import_module(_DCP)
    if not hasattr(type(parallel), "attn_dcp_size"):
        return Share(int(layers.get_attention_dcp_rank()), int(layers.get_attention_dcp_world_size()))
    ranks = int(parallel.attn_dcp_size)
    return Share(int(parallel.attn_dcp_rank), ranks) if ranks > 1 else WHOLE


def take_queries_in_parts() -> None:
    """Has SGLang's models hand over latent and rope columns as they are; else they join them for each layer."""
    if NAME not in _backends_given_parts():
        _backends_given_parts().append(NAME)


def take_queries_whole() -> None:
    """Undoes that, for all models of this process."""
    if NAME in _backends_given_parts():
        _backends_given_parts().remove(NAME)


def scales_queries(model_runner: Any) -> bool:
    """Whether the model scales queries by their position (Mistral Large 3), which SGLang does to whole ones only."""
    return getattr(model_runner.model_config.hf_text_config, "llama_4_scaling", None) is not None


def _backends_given_parts() -> list[str]:
    names: list[str] = import_module("sglang.srt.models.deepseek_common.utils").FORWARD_ABSORB_CORE_ATTENTION_BACKENDS
    return names


def speculation(model_runner: Any) -> Any:
    """What has the attributes `speculative_algorithm`, `speculative_eagle_topk`, ..."""
    context = import_module("sglang.srt.runtime_context")
    return context.get_spec() if hasattr(context, "get_spec") else model_runner.server_args


def draft_tokens(model_runner: Any) -> int:
    """Tokens per request that a step verifies; 1 without speculation."""
    return int(speculation(model_runner).speculative_num_draft_tokens or 1)
