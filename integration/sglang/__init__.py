"""SGLang's entry point into flashmla_backend.

SGLang calls it in every process it starts and swallows exceptions, so it says in the log why it declines.
Nothing of SGLang is imported before it is called.
"""

from __future__ import annotations

import logging

from ..claim import guarded

LOGGER_NAME = "flashmla_backend.sglang"


def register() -> None:
    """Makes `--attention-backend flashmla` select our backend (entry point `sglang.srt.plugins`)."""
    from . import plugin

    guarded(logging.getLogger(LOGGER_NAME), plugin.claim_flashmla, "SGLang keeps its own flashmla")
