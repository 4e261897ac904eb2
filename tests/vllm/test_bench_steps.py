"""`flashmla bench steps` with the real engine: our answers equal those of vLLM's own backend in fp32."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def test_two_backends_side_by_side(bench: Callable[..., dict[str, Any]]) -> None:
    measured = {"backends": "ours,CPU_MLA", "points": "2x100,1x130+1x64", "dtype": "float32"}
    made = bench("steps", **measured, warmup=1, windows=2, window=2, new_tokens=4)
    assert made["impls"]["tiny"]["ours"].startswith("flashmla_backend.")
    assert made["impls"]["tiny"]["CPU_MLA"].startswith("vllm.")
    for row in made["rows"]:
        assert row["ours"]["ms"] > 0 and row["CPU_MLA"]["ms"] > 0
    delta = made["deltas"]["tiny"]["ours"]
    assert delta["from"] == "CPU_MLA"
    assert delta["compared_tokens"] == 32 * 4
    assert 0 < delta["mean_abs_dlogprob"] < 1e-4


def test_answers_alone(bench: Callable[..., dict[str, Any]]) -> None:
    made = bench("steps", backends="ours,CPU_MLA", points="none", compared=64, new_tokens=8)
    assert made["rows"] == []
    delta = made["deltas"]["tiny"]["ours"]
    assert delta["compared_tokens"] == 64 * 8  # bf16: contexts stay the same although the likeliest tokens differ
    assert 0 < delta["standard_error"] < delta["mean_abs_dlogprob"] < 0.1
