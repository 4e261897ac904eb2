"""vLLM's two entry points into flashmla_backend.

vLLM calls them in every process it starts and lets their exceptions kill the engine, so they never raise:
they decline and say in the log why. Nothing of vLLM is imported before they are called.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TypeVar

from flashmla_backend.errors import Unsupported

Result = TypeVar("Result")

LOGGER_NAME = "vllm.flashmla_backend"  # a child of vLLM's logger: only those reach its output


def register() -> None:
    """Makes `--attention-backend flashmla` select our backend (entry point `vllm.general_plugins`)."""
    from . import plugin

    _guarded(plugin.claim_flashmla, "vLLM keeps its own FLASHMLA")


def cpu_platform() -> str | None:
    """Class path of our CPU platform, None where vLLM's own choice stands (`vllm.platform_plugins`)."""
    from . import plugin

    return _guarded(plugin.cpu_platform_path, "vLLM keeps its own platform")


def _guarded(step: Callable[[], Result], consequence: str) -> Result | None:
    logger = logging.getLogger(LOGGER_NAME)
    try:
        return step()
    except Unsupported as refusal:
        logger.warning("flashmla_backend: %s; %s", refusal, consequence)
    except Exception:
        logger.exception("flashmla_backend failed to load; %s", consequence)
    return None
