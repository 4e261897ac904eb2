"""What is kept of a load generator's result."""

from __future__ import annotations

from typing import Any

METRICS = ("ttft", "tpot", "itl", "e2el")  # vLLM's names: first token, per further token, between tokens, end to end
PERCENTILES = ("50", "90", "99")


def digest(result: dict[str, Any]) -> dict[str, Any]:
    """result: as `vllm bench serve` saves it. Times in milliseconds, throughputs per second."""
    kept = {key: result[key] for key in ("completed", "total_input_tokens", "total_output_tokens")}
    for key in ("duration", "request_throughput", "output_throughput", "total_token_throughput"):
        kept[key] = round(result[key], 4)
    for metric in METRICS:
        kept[f"{metric}_ms"] = {
            "mean": round(result[f"mean_{metric}_ms"], 3),
            **{f"p{which}": round(result[f"p{which}_{metric}_ms"], 3) for which in PERCENTILES},
        }
    return kept
