"""How vLLM executes steps when its backends are compared."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

KV_CACHE_BYTES = 1 << 30  # on the CPU, where vLLM would else ask for nearly all memory of a NUMA node to be free


def engine_arguments(compiled: bool, batches: Sequence[int] | None = None) -> dict[str, Any]:
    """Arguments of vllm.LLM: full CUDA graphs of decode, on the CPU, where there are none, eager.

    compiled: with torch.compile, as vLLM's default; without it a start takes half a minute less.
    batches: requests in a step for which graphs are captured, vLLM's own choice by default.
    """
    if not torch.cuda.is_available():
        # vLLM's CPU rotary op rotates MLA's q_pe wrongly; our platform switches it off, the stock one must be told.
        return {
            "enforce_eager": True,
            "compilation_config": {"custom_ops": ["-rotary_embedding"]},
            "kv_cache_memory_bytes": KV_CACHE_BYTES,
        }
    graphs: dict[str, Any] = {"cudagraph_mode": "FULL_DECODE_ONLY"}
    if batches is not None:
        graphs["cudagraph_capture_sizes"] = sorted(set(batches))
    return {"compilation_config": graphs if compiled else {"mode": 0, **graphs}}
