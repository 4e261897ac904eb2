"""`flashmla bench offline` with the real engine: all answers arrive, and every kind of step is seen."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from typer.testing import CliRunner

from flashmla_backend.bench.offline.child import work
from flashmla_backend.bench.offline.clock import StepClock
from flashmla_backend.cli import app


def test_a_job_of_mixed_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(Path.cwd()), os.environ.get("PYTHONPATH", "")]))
    report = tmp_path / "report.json"
    options = {
        "--prompts": "6",
        "--input-tokens": "70",
        "--output-tokens": "8",
        "--spread": "0",
        "--at-once": "3",
        "--batched-tokens": "24",
        "--rounds": "2",
        "--logs": str(tmp_path),
        "--out": str(report),
    }
    result = CliRunner().invoke(app, ["bench", "offline", *(word for pair in options.items() for word in pair)])
    assert result.exit_code == 0, result.output
    made = json.loads(report.read_text())
    assert made["impls"]["ours"].startswith("flashmla_backend.") and made["batched_tokens"] == {"ours": 24}
    (row,) = made["rows"]
    assert len(row["rounds"]) == 2 and row["rounds"][0]["steps"].keys() == {"prompts", "mixed", "decode"}
    # 420 tokens of prompts, at most 24 in a step, some of them decodes
    assert row["steps"]["prompts"] >= 2 and row["steps"]["prompts"] + row["steps"]["mixed"] > 420 / 24
    for one in row["rounds"]:
        clocked = sum(kind["seconds"] for kind in one["steps"].values())
        assert 0.5 * one["seconds"] < clocked <= one["seconds"] + 0.001
    assert row["total_throughput"]["median"] == pytest.approx(row["output_throughput"]["median"] * 78 / 8, rel=1e-3)


def test_an_answer_that_is_too_short_is_an_error() -> None:
    def generate(prompts: list[Any], sampling: list[Any], use_tqdm: bool) -> list[Any]:
        assert [len(prompt["prompt_token_ids"]) for prompt in prompts] == [5, 6]
        assert [one.max_tokens for one in sampling] == [2, 3]
        return [SimpleNamespace(outputs=[SimpleNamespace(token_ids=[0] * 2)])] * 2

    config = SimpleNamespace(model_config=SimpleNamespace(get_vocab_size=lambda: 9))
    llm = SimpleNamespace(generate=generate, llm_engine=SimpleNamespace(vllm_config=config))
    with pytest.raises(RuntimeError, match="request 1 was answered by 2 tokens instead of 3"):
        work(llm, StepClock(), [(5, 2), (6, 3)], 1)
