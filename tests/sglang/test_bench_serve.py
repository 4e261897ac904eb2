"""`flashmla bench serve --engine sglang` with the real server and SGLang's own load generator."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from typer.testing import CliRunner

from flashmla_backend.cli import app


def test_rates_and_requests_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("FLASHMLA_BACKEND_CACHE", str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(Path.cwd()), os.environ.get("PYTHONPATH", "")]))
    options = {"engine": "sglang", "rates": 2, "concurrency": 3, "seconds": 3, "rounds": 2, "spread": 0.2}
    options |= {"input-tokens": 70, "output-tokens": 10, "logs": tmp_path, "out": tmp_path / "report.json"}
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    ended = CliRunner().invoke(app, ["bench", "serve", *words])
    assert ended.exit_code == 0, ended.output
    made = json.loads((tmp_path / "report.json").read_text())
    assert made["engine"].startswith("sglang 0.5.")
    assert "serves MLA decode: CPU reference path" in made["served_by"]["ours"]
    assert [(row["load"], row["ours"]["completed"]) for row in made["rows"]] == [("2/s", 6), ("3 at once", 6)]
    for row in made["rows"]:
        assert 6 * 8 <= row["ours"]["total_output_tokens"] <= 6 * 12
        assert 6 * 56 <= row["ours"]["total_input_tokens"] <= 6 * 84
        assert 0 < row["ours"]["tpot_ms"]["p50"] <= row["ours"]["tpot_ms"]["p99"]
        assert 0 < row["ours"]["ttft_ms"]["p50"] < row["ours"]["e2el_ms"]["p50"]
