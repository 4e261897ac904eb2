"""`flashmla bench serve --engine sglang` with the real server and SGLang's own load generator."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def test_rates_and_requests_at_once(bench: Callable[..., dict[str, Any]]) -> None:
    loads = {"rates": 2, "concurrency": 3, "seconds": 3, "rounds": 2}
    made = bench("serve", engine="sglang", **loads, spread=0.2, input_tokens=70, output_tokens=10)
    assert made["engine"].startswith("sglang 0.5.")
    assert "serves MLA decode: CPU reference path" in made["served_by"]["ours"]
    assert [(row["load"], row["ours"]["completed"]) for row in made["rows"]] == [("2/s", 6), ("3 at once", 6)]
    for row in made["rows"]:
        assert 6 * 8 <= row["ours"]["total_output_tokens"] <= 6 * 12
        assert 6 * 56 <= row["ours"]["total_input_tokens"] <= 6 * 84
        assert 0 < row["ours"]["tpot_ms"]["p50"] <= row["ours"]["tpot_ms"]["p99"]
        assert 0 < row["ours"]["ttft_ms"]["p50"] < row["ours"]["e2el_ms"]["p50"]
