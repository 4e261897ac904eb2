"""What is kept of a load generator's result, and of those of several turns."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

METRICS = ("ttft", "tpot", "itl", "e2el")  # vLLM's names: first token, per further token, between tokens, end to end
PERCENTILES = ("50", "90", "99")
COUNTS = ("completed", "total_input_tokens", "total_output_tokens")


def digest(result: dict[str, Any]) -> dict[str, Any]:
    """result: as `vllm bench serve` saves it. Times in milliseconds, throughputs per second."""
    kept = {key: result[key] for key in COUNTS}
    for key in ("duration", "request_throughput", "output_throughput", "total_token_throughput"):
        kept[key] = round(result[key], 4)
    for metric in METRICS:
        kept[f"{metric}_ms"] = {
            "mean": round(result[f"mean_{metric}_ms"], 3),
            **{f"p{which}": round(result[f"p{which}_{metric}_ms"], 3) for which in PERCENTILES},
        }
    return kept


def medians(turns: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Of each number in what digest() kept of every turn. Of two counts it is the lower: one of the turns has it."""
    found: dict[str, Any] = {}
    for key in turns[0]:
        values = [turn[key] for turn in turns]
        if key in COUNTS:
            found[key] = statistics.median_low(values)
        elif isinstance(values[0], dict):
            found[key] = medians(values)
        else:
            found[key] = round(statistics.median(values), 4)
    return found
