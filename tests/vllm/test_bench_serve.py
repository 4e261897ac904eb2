"""`flashmla bench serve` and `flashmla bench soak` with the real server and vLLM's own load generator."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flashmla_backend.bench import provenance


def test_rates_and_requests_at_once(bench: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    made = bench("serve", rates="2", concurrency="3", seconds=3, rounds=2, input_tokens=70, output_tokens=9)
    assert [(row["load"], row["ours"]["completed"]) for row in made["rows"]] == [("2/s", 6), ("3 at once", 6)]
    for row in made["rows"]:
        assert row["ours"]["total_output_tokens"] == 6 * 9
        assert 0 < row["ours"]["tpot_ms"]["p50"] <= row["ours"]["tpot_ms"]["p99"]
        assert 0 < row["ours"]["ttft_ms"]["p50"] < row["ours"]["e2el_ms"]["p50"]
    assert "serves MLA decode: CPU reference path" in made["served_by"]["ours"]
    assert (tmp_path / "report.png").exists()


def test_a_short_soak(bench: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[tuple[float, int]] = []
    inner = provenance.write

    def write(report: dict[str, Any], path: Path) -> None:
        written.append((report["seconds"], len(report["memory"])))
        inner(report, path)

    monkeypatch.setattr(provenance, "write", write)
    made = bench("soak", seconds=25, phase=5, clients=6, longest=400)
    # After each phase, so that a soak that is cut short leaves what it has seen.
    assert [number for _, number in written] == [*range(1, len(made["memory"]) + 1)]
    assert written == sorted(written)
    assert made["failed"] == 0 and made["failures"] == []
    assert made["canaries"]["asked"] >= 3 and made["canaries"]["different"] == 1
    assert min(made["counters"][name] for name in ("preemptions", "prefix_hits", "accepted")) > 0
