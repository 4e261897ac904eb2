"""What flashmla cannot serve is refused when SGLang makes the backend, by name and with the way out."""

from __future__ import annotations

from typing import Any

from flashmla_backend.errors import Unsupported
from flashmla_backend.paging import D_QK, D_V, PAGE_SIZES
from flashmla_backend.schedule import TILE_TOKENS

from . import compat

FLAG = "--attention-backend flashmla"
WITHOUT_FLAG = f"drop {FLAG} to let SGLang choose"

# Options of SGLang's server, and why prompts cannot be served with them under DCP.
DCP_EXCLUDES = {
    "enable_mixed_chunk": "SGLang gathers cached tokens of prompts, not of requests that decode in the same batch",
    "enable_deterministic_inference": "SGLang's deterministic prompts read each rank's cache as if it held all tokens",
}


def check_runner(model_runner: Any) -> None:
    """Raises Unsupported unless our decode can serve this model runner."""
    config = model_runner.model_config
    if not model_runner.use_mla_backend:
        raise Unsupported(
            f"{FLAG} is for models with multi-head latent attention, and "
            f"{', '.join(config.hf_config.architectures)} runs without it; {WITHOUT_FLAG}"
        )
    latent, rope = config.kv_lora_rank, config.qk_rope_head_dim
    if (latent, latent + rope) != (D_V, D_QK):
        raise Unsupported(
            f"the model has kv_lora_rank {latent} and qk_rope_head_dim {rope}; {FLAG} takes {D_V} and "
            f"{D_QK - D_V}; {WITHOUT_FLAG}"
        )
    if model_runner.page_size % PAGE_SIZES[0]:
        raise Unsupported(
            f"page_size is {model_runner.page_size}; {FLAG} reads {PAGE_SIZES[0]} consecutive tokens and more at once, "
            f"so it takes multiples of {PAGE_SIZES[0]}; pass --page-size {TILE_TOKENS}"
        )
    if model_runner.kv_cache_dtype != model_runner.dtype:
        raise Unsupported(
            f"the KV cache is {_name(model_runner.kv_cache_dtype)}, the model {_name(model_runner.dtype)}; {FLAG} "
            f"takes a cache of the model's dtype and no FP8 yet; pass --kv-cache-dtype auto, or {WITHOUT_FLAG}"
        )
    if getattr(model_runner.server_args, "enable_unified_memory", False):
        raise Unsupported(
            f"--enable-unified-memory makes cache slots virtual, and {FLAG} reads physical ones; drop one of the two"
        )
    speculation = compat.speculation(model_runner)
    if speculation.speculative_algorithm == "NGRAM":
        raise Unsupported(f"n-gram speculation verifies trees of drafts, {FLAG} takes chains; {WITHOUT_FLAG}")
    check_topk(speculation.speculative_eagle_topk or 1)
    ranks = compat.dcp_share().ranks
    if ranks > 1:
        check_dcp(model_runner, ranks)


def check_topk(topk: int) -> None:
    if topk > 1:
        raise Unsupported(
            f"speculative_eagle_topk is {topk}, which makes trees of drafts; {FLAG} takes chains: pass "
            "--speculative-eagle-topk 1"
        )


def check_dcp(model_runner: Any, ranks: int) -> None:
    """Raises Unsupported unless our decode can serve this model runner with its cache shared out among `ranks`."""
    size = f"dcp_size is {ranks}"
    lacking = compat.missing(compat.USED_BY_DCP)
    if lacking is not None:
        raise Unsupported(
            f"{size}, and {FLAG} needs a SGLang that merges the ranks' outputs by a natural LSE, as "
            f"{'.'.join(map(str, compat.OLDEST_WITH_DCP))} and newer do: {lacking}; pass --dcp-size 1 or install one"
        )
    if not hasattr(model_runner.model, compat.GATHERS_FOR_DCP):
        raise Unsupported(
            f"{size}, and SGLang gathers no cached tokens for prompts of {type(model_runner.model).__name__}; pass "
            "--dcp-size 1"
        )
    if compat.speculation(model_runner).speculative_algorithm is not None:
        raise Unsupported(
            f"{size}, which deals the tokens of a chain of drafts out among the ranks, and {FLAG} verifies whole ones; "
            "pass --dcp-size 1 or drop --speculative-algorithm"
        )
    if compat.scales_queries(model_runner):
        raise Unsupported(
            f"{size}, and SGLang takes no LSE from models that scale their queries by position; pass --dcp-size 1"
        )
    for option, why in DCP_EXCLUDES.items():
        if getattr(model_runner.server_args, option, False):
            raise Unsupported(f"{size}, and {why}; pass --dcp-size 1 or drop --{option.replace('_', '-')}")


def _name(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")
