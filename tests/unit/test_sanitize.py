"""buildtools/sanitize.py: what it makes of compute-sanitizer's output. The tools are made up."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import sanitize

CLEAN = """========= COMPUTE-SANITIZER
OK decode, 16 heads: 0 of 9 values out of bounds
OK naive, 16 heads: 0 of 9 values out of bounds
========= ERROR SUMMARY: 0 errors
"""
RACES = """========= COMPUTE-SANITIZER
========= Error: Race reported between Write access at decode_kernel+0x1a0
=========     and Read access at decode_kernel+0x2b0 [768 hazards]
OK decode, 16 heads: 0 of 9 values out of bounds
========= RACECHECK SUMMARY: 3 hazards displayed (2 errors, 1 warning)
"""


PYTEST = """========= COMPUTE-SANITIZER
....
4 passed, 1 skipped in 12.34s
========= ERROR SUMMARY: 0 errors
"""


def test_tests_are_counted() -> None:
    assert sanitize.judge(PYTEST, 0)["cases"] == 4 and sanitize.is_clean(sanitize.judge(PYTEST, 0))
    failed = PYTEST.replace("4 passed", "1 failed, 3 passed")
    assert sanitize.judge(failed, 1)["cases"] == 4 and not sanitize.is_clean(sanitize.judge(failed, 1))
    assert not sanitize.is_clean(sanitize.judge(PYTEST.replace("4 passed, 1", "5"), 0))  # all skipped


def test_the_tests_are_there() -> None:
    for name in sanitize.TESTS:
        file, _, function = name.partition("[")[0].partition("::")
        assert f"def {function}(" in (Path(sanitize.__file__).parents[1] / file).read_text()


def test_clean() -> None:
    verdict = sanitize.judge(CLEAN, 0)
    assert sanitize.is_clean(verdict)
    assert (verdict["errors"], verdict["warnings"], verdict["cases"], verdict["findings"]) == (0, 0, 2, [])


def test_races_are_counted_and_shown() -> None:
    verdict = sanitize.judge(RACES, 0)
    assert not sanitize.is_clean(verdict)
    assert (verdict["errors"], verdict["warnings"], verdict["cases"]) == (2, 1, 1)
    assert verdict["findings"][0].startswith("Error: Race reported") and len(verdict["findings"]) == 2


@pytest.mark.parametrize(
    "output, exit_code",
    [
        (CLEAN.replace("SUMMARY: 0", "SUMMARY: 7"), 0),
        (CLEAN.replace("OK naive", "FAIL naive"), 1),
        (CLEAN.replace("OK ", "..."), 0),  # nothing was run
        ("========= COMPUTE-SANITIZER\nDevice not supported\n", 0),  # no summary
        (CLEAN, -1),
    ],
)
def test_anything_else_is_not_clean(output: str, exit_code: int) -> None:
    assert not sanitize.is_clean(sanitize.judge(output, exit_code))


def test_command(tmp_path: Path) -> None:
    tool = tmp_path / "compute-sanitizer"
    tool.write_text(f"#!/bin/sh\n[ $2 = racecheck ] && cat <<'E' || cat <<'F'\n{RACES}E\n{CLEAN}F\n")
    tool.chmod(0o755)
    program = tmp_path / "program"
    program.touch()
    command = [sys.executable, sanitize.__file__, str(program), "--tools", "memcheck,racecheck"]
    done = subprocess.run(command, env={"PATH": f"{tmp_path}:/bin:/usr/bin"}, capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    assert "OK memcheck: 0 errors, 0 warnings, 2 cases" in done.stdout
    assert "FAIL racecheck: 2 errors, 1 warnings, 1 cases" in done.stdout
    assert "tests" not in done.stdout
    done = subprocess.run(
        [*command, "--tests"], env={"PATH": f"{tmp_path}:/bin:/usr/bin"}, capture_output=True, text=True
    )
    assert "OK memcheck, tests: 0 errors" in done.stdout and "FAIL racecheck, tests: 2 errors" in done.stdout
    program.unlink()
    done = subprocess.run(command, env={"PATH": f"{tmp_path}:/bin:/usr/bin"}, capture_output=True, text=True)
    assert done.returncode == 2 and "program is not there: build it with" in done.stderr
