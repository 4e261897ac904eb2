"""The decision whether vLLM's FLASHMLA becomes ours, taken anew in each process."""

from __future__ import annotations

import logging
from typing import Any

from flashmla_backend.errors import Unsupported

from ..claim import DISABLE_VARIABLE, check_gpu, disabled
from . import LOGGER_NAME, compat

logger = logging.getLogger(LOGGER_NAME)

PACKAGE = "flashmla_backend.integration.vllm"
BACKEND_PATH = f"{PACKAGE}.backend.FlashMLABackend"

# vLLM's own choice for this machine -> the same platform with our backend in it
CPU_PLATFORMS = {
    "vllm.platforms.cpu.CpuPlatform": f"{PACKAGE}.platform.FlashMLACpuPlatform",
    "vllm.platforms.zen_cpu.ZenCpuPlatform": f"{PACKAGE}.platform.FlashMLAZenCpuPlatform",
}


def claim_flashmla() -> None:
    """Points vLLM's FLASHMLA at our backend, once or again. Raises Unsupported where it must stay vLLM's."""
    if disabled():
        logger.info("flashmla_backend: %s is set; vLLM keeps its own FLASHMLA", DISABLE_VARIABLE)
        return
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend
    from vllm.version import __version__ as found

    flashmla = AttentionBackendEnum.FLASHMLA
    if flashmla.is_overridden():
        if flashmla.get_path() == BACKEND_PATH:
            return
        raise Unsupported(
            f"another plugin has already claimed FLASHMLA for {flashmla.get_path()}; "
            "uninstall one of the two, or list the plugins to load in VLLM_PLUGINS"
        )
    compat.check_version(found)
    _check_hardware()
    register_backend(flashmla, BACKEND_PATH)
    logger.info("flashmla_backend: `--attention-backend flashmla` selects %s", BACKEND_PATH)


def owns_flashmla() -> bool:
    """Whether FLASHMLA is ours in this process; another plugin may claim it after us."""
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    return AttentionBackendEnum.FLASHMLA.get_path() == BACKEND_PATH


def cpu_platform_path() -> str | None:
    """Class path of our CPU platform, None on a build of vLLM for other devices or when disabled."""
    if disabled():
        return None
    from vllm.platforms import cpu_platform_plugin
    from vllm.version import __version__ as found

    builtin = cpu_platform_plugin()
    if builtin is None:
        return None
    compat.check_version(found, oldest=compat.OLDEST_ON_CPU)
    if builtin not in CPU_PLATFORMS:
        raise Unsupported(f"vLLM chose {builtin}; known CPU platforms are {', '.join(CPU_PLATFORMS)}")
    return CPU_PLATFORMS[builtin]


def _check_hardware() -> None:
    from vllm.platforms import current_platform

    platform = f"{type(current_platform).__module__}.{type(current_platform).__qualname__}"
    if current_platform.is_cpu():
        if platform not in CPU_PLATFORMS.values():
            raise Unsupported(
                f"vLLM runs {platform}, which ignores --attention-backend for MLA; "
                "unset VLLM_TARGET_DEVICE and let VLLM_PLUGINS include flashmla_backend_cpu"
            )
    elif current_platform.is_cuda():
        _check_gpu(current_platform)
    else:
        raise Unsupported(f"vLLM runs {platform}; flashmla_backend serves it on Hopper GPUs and on CPUs")


def _check_gpu(platform: Any) -> None:
    capability = platform.get_device_capability()  # asked of the driver's library: CUDA stays uninitialised
    if capability is None:
        raise Unsupported("vLLM cannot tell the GPU's compute capability")
    check_gpu("vLLM", platform.get_device_name(), (capability.major, capability.minor))
