"""`flashmla bench offline` with the real engine: all answers arrive, and every kind of step is seen."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from flashmla_backend.bench.offline.child import work
from flashmla_backend.bench.offline.clock import StepClock


def test_a_job_of_mixed_steps(bench: Callable[..., dict[str, Any]]) -> None:
    job = {"prompts": 6, "input_tokens": 70, "output_tokens": 8, "spread": 0}
    made = bench("offline", **job, at_once=3, batched_tokens=24, rounds=2)
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
