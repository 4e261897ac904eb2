"""The JSON record that `pytest tests/kernels --record FILE` writes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
CONFTEST = "from tests.kernels.conftest import pytest_addoption, pytest_configure\n"
TESTS = """
import pytest

@pytest.mark.parametrize("x", [1, 2, 3])
def test_grid(x, record_property):
    record_property("cases", 10)
    assert x != 2, "x is two"

def test_skipped():
    pytest.skip("no CUDA device")

def test_right():
    pass
"""


def record_of(folder: Path, tests: str) -> dict[str, Any]:
    (folder / "conftest.py").write_text(CONFTEST)
    (folder / "test_some.py").write_text(tests)
    command = [sys.executable, "-m", "pytest", str(folder), f"--record={folder / 'r.json'}", "--commit=abc"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    subprocess.run(command, cwd=folder, env=environment, capture_output=True, timeout=120)
    return json.loads((folder / "r.json").read_text())


def test_what_was_run_and_what_failed(tmp_path: Path) -> None:
    record = record_of(tmp_path, TESTS)
    assert record["commit"] == "abc" and record["command"] == f"pytest {tmp_path.name} --record=r.json --commit=abc"
    assert [record[key] for key in ("tests", "cases", "failed", "skipped", "exit_status")] == [4, 31, 1, 1, 1]
    grid = record["groups"]["test_some.py::test_grid"]
    assert (grid["tests"], grid["cases"], grid["failed"], grid["skipped"]) == (3, 30, 1, 0)
    [failure] = record["failures"]
    assert failure["test"] == "test_some.py::test_grid[2]" and "x is two" in failure["what"]


def test_tests_that_cannot_be_loaded_are_failures(tmp_path: Path) -> None:
    record = record_of(tmp_path, "import no_such_module")
    assert record["exit_status"] == 2 and record["tests"] == 0
    assert "no_such_module" in record["failures"][0]["what"]
