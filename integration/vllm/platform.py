"""vLLM's CPU platform, with `--attention-backend flashmla` honoured for MLA models.

Stock vLLM runs every MLA model on the CPU through its own backend, in blocks of 16 tokens, without chunked
prefill and prefix caching. When flashmla is selected none of that holds: what the user asked for is put back.
"""

from __future__ import annotations

from typing import Any

from vllm.logger import init_logger
from vllm.platforms.cpu import CpuPlatform
from vllm.platforms.zen_cpu import ZenCpuPlatform
from vllm.v1.attention.backends.registry import AttentionBackendEnum

from flashmla_backend.errors import InvalidArgument, Unsupported
from flashmla_backend.paging import PAGE_SIZES

from . import LOGGER_NAME
from .plugin import BACKEND_PATH, owns_flashmla

logger = init_logger(LOGGER_NAME)

DEFAULT_BLOCK_SIZE = 64
FLAG = "--attention-backend flashmla"
WITHOUT_FLAG = f"drop {FLAG} to let vLLM choose"


class FlashMLACpuPlatform(CpuPlatform):
    """CpuPlatform that honours `--attention-backend flashmla`; without that flag, CpuPlatform."""

    @classmethod
    def check_and_update_config(cls, vllm_config: Any) -> None:
        if not _serves(vllm_config):
            super().check_and_update_config(vllm_config)
            return
        _check_request(vllm_config)
        cache, scheduler = vllm_config.cache_config, vllm_config.scheduler_config
        block_size = cache.block_size if cache.user_specified_block_size else DEFAULT_BLOCK_SIZE
        prefix_caching = cache.enable_prefix_caching
        chunked_prefill, batched_tokens = scheduler.enable_chunked_prefill, scheduler.max_num_batched_tokens

        super().check_and_update_config(vllm_config)

        cache.block_size = block_size
        cache.enable_prefix_caching = prefix_caching
        scheduler.enable_chunked_prefill, scheduler.max_num_batched_tokens = chunked_prefill, batched_tokens
        # vLLM's CPU rotary op silently rotates MLA's 3-D q_pe wrongly; its torch code does not.
        if "-rotary_embedding" not in vllm_config.compilation_config.custom_ops:
            vllm_config.compilation_config.custom_ops.append("-rotary_embedding")
        logger.info_once(
            "flashmla_backend: block size %d, chunked prefill %s, prefix caching %s, "
            "whatever vLLM said above of its own CPU MLA backend",
            block_size,
            "on" if chunked_prefill else "off",
            "on" if prefix_caching else "off",
        )

    @classmethod
    def get_attn_backend_cls(
        cls, selected_backend: Any, attn_selector_config: Any, num_heads: int | None = None
    ) -> str:
        if selected_backend != AttentionBackendEnum.FLASHMLA or not owns_flashmla():
            return super().get_attn_backend_cls(selected_backend, attn_selector_config, num_heads)
        reasons = selected_backend.get_class().validate_configuration(
            device_capability=cls.get_device_capability(), **attn_selector_config._asdict()
        )
        if reasons:
            raise Unsupported(f"{FLAG} cannot serve {attn_selector_config}: {'; '.join(reasons)}; {WITHOUT_FLAG}")
        return BACKEND_PATH


class FlashMLAZenCpuPlatform(FlashMLACpuPlatform, ZenCpuPlatform):
    """The same on AMD Zen with zentorch, where vLLM chooses ZenCpuPlatform."""


def _serves(vllm_config: Any) -> bool:
    """Whether flashmla is selected for this model's attention, and ours to serve."""
    attention, model = vllm_config.attention_config, vllm_config.model_config
    selected = attention.backend_per_kind.get("mla_attention", attention.backend)
    if model is None or selected != AttentionBackendEnum.FLASHMLA:
        return False
    if owns_flashmla():
        return True
    logger.warning_once(
        "flashmla_backend: %s is not served by it, FLASHMLA belongs to %s",
        FLAG,
        AttentionBackendEnum.FLASHMLA.get_path(),
    )
    return False


def _check_request(vllm_config: Any) -> None:
    model, cache = vllm_config.model_config, vllm_config.cache_config
    if not model.use_mla:
        raise Unsupported(
            f"{FLAG} is for models with multi-head latent attention, and {model.model} "
            f"({', '.join(model.architectures)}) runs without it; {WITHOUT_FLAG}"
        )
    if cache.user_specified_block_size and cache.block_size not in PAGE_SIZES:
        raise InvalidArgument(
            f"block_size is {cache.block_size}; {FLAG} takes {', '.join(map(str, PAGE_SIZES))} tokens"
        )
    drafts = vllm_config.speculative_config
    if drafts is not None and drafts.use_eagle() and drafts.attention_backend != AttentionBackendEnum.FLASHMLA:
        # vLLM chooses anew for the drafting model, and its own CPU backend cannot share our pages.
        raise Unsupported(
            f"speculative_config has method {drafts.method!r} without the backend of the drafting model; add "
            '"attention_backend": "flashmla" to it'
        )
    if "+rotary_embedding" in vllm_config.compilation_config.custom_ops:
        raise Unsupported(
            "custom_ops has '+rotary_embedding', which rotates MLA queries wrongly on the CPU; leave it out"
        )
