"""benchmarks/compare_builds.py, on the CPU: what it says of builds and how it ends."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import flashmla_backend

ROOT = Path(__file__).parents[2]
SHAPE = ["--heads", "4", "--sq", "1", "--batch", "1", "--lens", "64"]


def compare(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, ROOT / "benchmarks" / "compare_builds.py", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_a_build_beside_itself(tmp_path: Path) -> None:
    (tmp_path / "same").symlink_to(Path(flashmla_backend.__file__).parents[1])
    out = tmp_path / "builds.json"
    done = compare(tmp_path / "same", "--turns", "2", "--each", "--out", out, *SHAPE, "--impls", "ours")
    assert done.returncode == 0, done.stderr
    turns = json.loads(out.read_text())
    assert [turn["turn"] for turn in turns] == [1, 2]
    (times,) = zip(*(turn["us"] for turn in turns), strict=True)
    assert all(us[:5] == [4, 1, 1, 64, "fixed"] for us in times)
    least = min(us[5]["ours"] for us in times)
    table, _, each = done.stdout.rpartition("microseconds")
    assert "b = 1, 4 rows" in table and "1.000 (1.00 .. 1.00)" in table
    assert f"{least:.2f}" in each and "ours-invariant" not in each


def test_a_build_that_is_not_what_python_finds(tmp_path: Path) -> None:
    done = compare(tmp_path, "--turns", "1", *SHAPE)
    assert done.returncode == 1 and "turn 1: exit code" in done.stdout
    assert f"hides the build in {tmp_path}" in done.stderr
