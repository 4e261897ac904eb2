"""`flashmla bench steps` with the real engine: our answers equal those of vLLM's own backend in fp32."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from typer.testing import CliRunner

from flashmla_backend.cli import app


def test_two_backends_side_by_side(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(Path.cwd()), os.environ.get("PYTHONPATH", "")]))
    report = tmp_path / "report.json"
    options = {
        "--backends": "ours,CPU_MLA",
        "--points": "2x100,1x130+1x64",
        "--dtype": "float32",
        "--warmup": "1",
        "--windows": "2",
        "--window": "2",
        "--new-tokens": "4",
        "--logs": str(tmp_path),
        "--out": str(report),
    }
    result = CliRunner().invoke(app, ["bench", "steps", *(word for pair in options.items() for word in pair)])
    assert result.exit_code == 0, result.output
    made = json.loads(report.read_text())
    assert made["impls"]["tiny"]["ours"].startswith("flashmla_backend.")
    assert made["impls"]["tiny"]["CPU_MLA"].startswith("vllm.")
    for row in made["rows"]:
        assert row["ours"]["ms"] > 0 and row["CPU_MLA"]["ms"] > 0
    delta = made["deltas"]["tiny"]["ours"]
    assert delta["from"] == "CPU_MLA"
    assert delta["compared_tokens"] == 32 * 4
    assert 0 < delta["mean_abs_dlogprob"] < 1e-4
