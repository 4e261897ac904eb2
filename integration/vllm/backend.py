"""What vLLM asks before it selects us: names, classes, and what can be served."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import torch
from vllm.model_executor.layers.attention.mla_attention import MLACommonBackend
from vllm.platforms import current_platform

from flashmla_backend.paging import D_QK, PAGE_SIZES
from flashmla_backend.schedule import TILE_TOKENS

if TYPE_CHECKING:
    from vllm.config.cache import CacheDType

    from .builder import FlashMLAMetadataBuilder
    from .impl import FlashMLAImpl

PREFERRED_PAGE_SIZE = TILE_TOKENS


class FlashMLABackend(MLACommonBackend):
    """vLLM's FLASHMLA, served by flashmla_backend."""

    # float32 is for the CPU alone: tokens there equal those of a plain fp32 model.
    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.bfloat16, torch.float16, torch.float32]
    supported_kv_cache_dtypes: ClassVar[list[CacheDType]] = ["auto", "bfloat16", "float16"]

    @staticmethod
    def get_name() -> str:
        return "FLASHMLA"

    @staticmethod
    def get_builder_cls() -> type[FlashMLAMetadataBuilder]:
        from .builder import FlashMLAMetadataBuilder

        return FlashMLAMetadataBuilder

    @staticmethod
    def get_impl_cls() -> type[FlashMLAImpl]:
        from .impl import FlashMLAImpl

        return FlashMLAImpl

    @classmethod
    def get_supported_head_sizes(cls) -> list[int]:
        return [D_QK]

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[Any]:
        """vLLM splits larger blocks into pages of the largest of these that divides them."""
        return [size for size in PAGE_SIZES if size <= TILE_TOKENS]

    @classmethod
    def get_preferred_block_size(cls, default_block_size: int) -> int:
        return PREFERRED_PAGE_SIZE

    @classmethod
    def supports_compute_capability(cls, capability: Any) -> bool:
        return capability is None or capability.major == 9  # None: the CPU

    @classmethod
    def supports_batch_invariance(cls) -> bool:
        return True

    @classmethod
    def supports_combination(
        cls, head_size: int, dtype: torch.dtype, kv_cache_dtype: CacheDType | None, *others: Any, **more: Any
    ) -> str | None:
        cached = {"bfloat16": torch.bfloat16, "float16": torch.float16}.get(kv_cache_dtype or "auto", dtype)
        if cached != dtype:
            return f"a {cached} cache for a {dtype} model is not supported"
        if dtype == torch.float32 and not current_platform.is_cpu():
            return "float32 is served on the CPU only, the Hopper kernels take bfloat16 and float16"
        return None
