"""The MLA backends of vLLM that ours is compared with, and how each is selected."""

from __future__ import annotations

from flashmla_backend.errors import InvalidArgument
from flashmla_backend.integration.claim import DISABLE_VARIABLE

OURS = "ours"
BUILTINS = ("FLASHMLA", "FLASH_ATTN_MLA", "TRITON_MLA", "CPU_MLA")
REFERENCES = ("TRITON_MLA", "CPU_MLA")  # the first of them that ran is what the others' answers are compared with


def selection(backend: str) -> tuple[str, dict[str, str]]:
    """What `--attention-backend` is given, and the environment that goes with it."""
    if backend == OURS:
        return "FLASHMLA", {DISABLE_VARIABLE: "0"}
    return backend, {DISABLE_VARIABLE: "1"}


def parse(text: str, builtins: tuple[str, ...] = BUILTINS) -> list[str]:
    """Names separated by commas. Raises InvalidArgument for one that is neither ours nor among the engine's own."""
    names = text.split(",")
    for name in names:
        if name not in (OURS, *builtins):
            raise InvalidArgument(f"backends has {name!r}; accepted: {', '.join((OURS, *builtins))}")
    return names
