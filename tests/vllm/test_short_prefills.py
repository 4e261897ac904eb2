"""benchmarks/short_prefills.py with the real engine on the CPU: both ways at every point, and neither for the other."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import short_prefills
from short_prefills import DECODED, PREFILLED

from flashmla_backend.bench.prefills.child import Answered, check

ROOT = Path(__file__).parents[2]


def test_both_ways_at_every_point(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "short_prefills.py"), "--out", "report.json"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    ran = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    made: dict[str, Any] = json.loads((tmp_path / "report.json").read_text())
    assert made["impls"]["tiny"]["ours"].startswith("flashmla_backend.") and not made["failed"]
    points = [(row["context"], row["requests"], row["new"]) for row in made["rows"]]
    assert points == list(product((0, 128), (1, 2), (8, 70)))
    for row in made["rows"]:
        assert row[DECODED]["decoded"] and not row[PREFILLED]["decoded"]
        for contender in (DECODED, PREFILLED):
            assert 0 < row[contender]["least_ms"] <= row[contender]["ms"]
            assert row[contender]["step_ms"] < row[contender]["ms"]
    assert made["longest_decoded"] == short_prefills.longest_decoded(made["rows"])
    assert f"| tiny | 128 | 2 | 70 | {made['rows'][-1][PREFILLED]['ms']:.2f} |" in ran.stdout


def test_what_was_not_measured_as_it_should_be_is_an_error() -> None:
    point = {"context": 128, "requests": 2, "new": 8, "contenders": {DECODED: 64, PREFILLED: 1, "FLASHMLA": None}}

    def answered(cached: int = 128, steps: int = 1, decoded: int = 0) -> Answered:
        return Answered(ms=2.0, step_ms=1.0, steps=steps, cached=[128, cached], decoded=decoded)

    check(answered(decoded=16), point, DECODED)
    check(answered(), point, PREFILLED)
    for decoded in (0, 16):
        check(answered(decoded=decoded), point, "FLASHMLA")
    for wrong, name, message in (
        (answered(cached=64), PREFILLED, r"\[128, 64\] tokens were cached"),
        (answered(steps=2), PREFILLED, "2 steps instead of one"),
        (answered(decoded=16), PREFILLED, "16 of 16 tokens were decoded, threshold 1"),
        (answered(), DECODED, "0 of 16 tokens were decoded, threshold 64"),
        (answered(decoded=8), "FLASHMLA", "8 of 16 tokens were decoded"),
    ):
        with pytest.raises(RuntimeError, match=message):
            check(wrong, point, name)


def test_the_longest_prompts_that_decode_no_slower() -> None:
    def row(new: int, decoded_ms: float, prefilled_ms: float) -> dict[str, Any]:
        point = {"model": "m", "context": 0, "requests": 1, "new": new}
        return {**point, DECODED: {"ms": decoded_ms}, PREFILLED: {"ms": prefilled_ms}}

    rows = [row(8, 1.0, 1.5), row(16, 1.019, 1.0), row(32, 1.03, 1.0), {"model": "m", "context": 64, "requests": 1}]
    case = {"model": "m", "context": 0, "requests": 1}
    assert short_prefills.longest_decoded(rows) == [{**case, "new": 16}]
    assert short_prefills.longest_decoded(rows[2:]) == [{**case, "new": 0}]


def test_thresholds_that_come_to_the_same_are_measured_once() -> None:
    assert short_prefills.contenders("ours", 64, [1, 64, 1024]) == {PREFILLED: 1, DECODED: 1024}
    assert short_prefills.contenders("FLASHMLA", 64, [1, 64]) == {"FLASHMLA": None}
