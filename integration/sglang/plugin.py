"""The decision whether SGLang's `flashmla` becomes ours, taken anew in each process."""

from __future__ import annotations

import logging
import sys

import torch

from flashmla_backend.errors import Unsupported

from ..claim import DISABLE_VARIABLE, check_gpu, disabled
from . import LOGGER_NAME, compat
from .compat import NAME

logger = logging.getLogger(LOGGER_NAME)


def claim_flashmla() -> None:
    """Points SGLang's `flashmla` at our backend, once or again. Raises Unsupported where it must stay SGLang's."""
    if disabled():
        logger.info("flashmla_backend: %s is set; SGLang keeps its own flashmla", DISABLE_VARIABLE)
        return
    from sglang.srt.layers.attention import attention_registry
    from sglang.version import __version__ as found

    served_by = attention_registry.ATTENTION_BACKENDS.get(NAME)
    if owns_flashmla():
        return
    compat.check_version(found)
    compat.check_internals(found)
    _check_hardware()
    if served_by is not attention_registry.create_flashmla_backend:
        raise Unsupported(
            f"another plugin has already claimed flashmla for {served_by!r}; uninstall one of the two, or list the "
            "plugins to load in SGLANG_PLUGINS"
        )
    from sglang.srt.models.deepseek_common.attention_backend_handler import AttentionBackendRegistry

    from . import backend, draft, prefill

    # Draft workers, and the checks which of them may use CUDA graphs, import these two classes from there.
    backend_module = sys.modules[compat.DRAFT_MODULE] = draft
    assert backend_module.FlashMLABackend is backend.FlashMLABackend
    AttentionBackendRegistry.register(NAME, prefill.dispatch)
    compat.take_queries_in_parts()
    attention_registry.ATTENTION_BACKENDS[NAME] = backend.FlashMLABackend
    logger.info("flashmla_backend: `--attention-backend flashmla` selects %s", backend.FlashMLABackend)


def owns_flashmla() -> bool:
    """Whether flashmla is ours in this process; another plugin may claim it after us."""
    from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS

    served_by = ATTENTION_BACKENDS.get(NAME)
    return getattr(served_by, "__module__", "").startswith(__package__)


def _check_hardware() -> None:
    """Without a GPU the CPU path serves."""
    if not torch.cuda.is_available():
        return
    if torch.version.cuda is None:
        raise Unsupported(
            f"{torch.cuda.get_device_name()} is no NVIDIA GPU; flashmla_backend serves Hopper GPUs and CPUs"
        )
    check_gpu("SGLang", torch.cuda.get_device_name(), torch.cuda.get_device_capability())
