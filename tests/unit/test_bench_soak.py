"""`flashmla bench soak` without a server: what makes it fail, and what it sees."""

from __future__ import annotations

import itertools
import os
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from flashmla_backend.bench.soak import watch
from flashmla_backend.bench.soak.run import Plan, Results, failures, growths
from flashmla_backend.bench.soak.traffic import KEPT_ERRORS, KINDS, Tally, deal
from flashmla_backend.cli import app

PLAN = Plan("embedded", "bfloat16", 30, 10, 4, 512, 12, 3, 64, 100, Path(), [])


def passed() -> Results:
    memory = [
        {"seconds": 1.0 + step, "host_mib": 1000.0 + 100 * (step < 4), "gpu_mib": 500.0 + step} for step in range(10)
    ]
    counters = dict.fromkeys(watch.COUNTERS, 7.0)
    return Results(Tally(Counter(KINDS)), ["same"] * 3, memory, counters, "flashmla_backend serves", 10.0)


def _error(results: Results) -> None:
    for number in range(KEPT_ERRORS + 3):
        results.tally.fail(f"error {number}")


def _drift(results: Results) -> None:
    results.canaries.append("other")


def _growth(results: Results) -> None:
    results.memory[-1]["gpu_mib"] += 100


def _idle(results: Results) -> None:
    results.counters["preemptions"] = 0.0


def _no_streams(results: Results) -> None:
    del results.tally.answered["cancelled"]


def test_every_kind_has_its_share() -> None:
    assert Counter(itertools.islice(deal(), 40)) == {kind: 2 * share for kind, share in KINDS.items()}


def test_a_soak_that_passes() -> None:
    assert failures(PLAN, passed()) == []
    assert growths(passed()) == {"host_mib": -100.0, "gpu_mib": 6.0}


@pytest.mark.parametrize(
    ("broken", "said"),
    [
        (_error, "and 3 more requests failed"),
        (_drift, "the canary had 2 different answers in 4"),
        (_growth, "gpu_mib grew by 106 MiB"),
        (_idle, "no preemptions"),
        (_no_streams, "no cancelled request"),
    ],
)
def test_what_fails_a_soak(broken: Any, said: str) -> None:
    results = passed()
    broken(results)
    assert any(said in failure for failure in failures(PLAN, results))


def test_metrics_and_memory() -> None:
    text = 'vllm:num_preemptions_total{engine="0"} 2.0\nvllm:num_preemptions_total{engine="1"} 3\nother_total 9\n'
    assert watch.read(text, watch.COUNTERS["preemptions"]) == 5
    assert watch.read(text, "vllm:absent") == 0
    assert watch.host_mib(os.getpgid(0)) > 50


def test_a_cache_for_less_than_one_request_is_refused() -> None:
    said = CliRunner().invoke(app, ["bench", "soak", "--blocks", "5", "--longest", "1024"])
    assert said.exit_code == 2 and "blocks is 5; 1024 tokens need 18 or more" in said.output
