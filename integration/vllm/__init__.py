"""vLLM's two entry points into flashmla_backend.

vLLM calls them in every process it starts and lets their exceptions kill the engine, so they never raise:
they decline and say in the log why. Nothing of vLLM is imported before they are called.
"""

from __future__ import annotations

import logging

from ..claim import guarded

LOGGER_NAME = "vllm.flashmla_backend"  # a child of vLLM's logger: only those reach its output


def register() -> None:
    """Makes `--attention-backend flashmla` select our backend (entry point `vllm.general_plugins`)."""
    from . import plugin

    guarded(logging.getLogger(LOGGER_NAME), plugin.claim_flashmla, "vLLM keeps its own FLASHMLA")


def cpu_platform() -> str | None:
    """Class path of our CPU platform, None where vLLM's own choice stands (`vllm.platform_plugins`)."""
    from . import plugin

    return guarded(logging.getLogger(LOGGER_NAME), plugin.cpu_platform_path, "vLLM keeps its own platform")
