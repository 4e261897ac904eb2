"""Run compute-sanitizer's tools over a GPU program and kernel tests:

    python buildtools/sanitize.py PROGRAM --tests --out FILE.json

The tools run at once; the report is written after each.
PROGRAM prints one line for each case, "OK ..." or "FAIL ...", as flashmla_decode_smoke does. Exit code 1 if a tool
finds an error, or a case fails under it. initcheck runs over PROGRAM only: in the tests our kernels alone are watched,
and it would take for unwritten all that torch's kernels wrote.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

TOOLS = ("memcheck", "racecheck", "synccheck", "initcheck")
SUMMARY = re.compile(
    r"^========= (?:ERROR SUMMARY: (\d+) error|RACECHECK SUMMARY: .*\((\d+) errors?, (\d+) warnings?\))", re.MULTILINE
)
FINDING = re.compile(r"^========= +(?!COMPUTE-SANITIZER|ERROR SUMMARY|RACECHECK SUMMARY)(\S.*)$", re.MULTILINE)
PYTEST = re.compile(r"^(?:\d+ \w+, )*\d+ \w+ in [\d.]+s", re.MULTILINE)  # pytest's last line, of `-q`
SHOWN_LINES = 40

TESTED_TOOLS = ("memcheck", "racecheck", "synccheck")
WATCHED = ("--kernel-regex", "kns=flashmla")
TESTS = (
    "tests/kernels/test_decode.py::test_queries_outnumber_tokens_without_a_mask",
    "tests/kernels/test_decode.py::test_inputs_may_be_views",
    "tests/kernels/test_decode.py::test_drop_in",
    "tests/kernels/test_decode.py::test_empty_batch",
    "tests/kernels/test_decode.py::test_edge_lengths[65]",
    "tests/kernels/test_decode.py::test_edge_lengths[513]",
    "tests/kernels/test_batch_invariance.py::test_rows_that_see_nothing",
    "tests/kernels/test_batch_invariance.py::test_beside_one_long_request",
)


def judge(output: str, exit_code: int) -> dict[str, Any]:
    """What a tool's output says: errors (None if it never came to its summary), warnings, and the program's cases."""
    summary = SUMMARY.search(output)
    errors = summary and int(summary[1] or summary[2] or 0)
    lines = output.splitlines()
    tests = [int(n) for line in PYTEST.findall(output) for n in re.findall(r"(\d+) (?:passed|failed)", line)]
    return {
        "errors": errors,
        "warnings": int(summary[3] or 0) if summary else 0,
        "exit_code": exit_code,
        "cases": sum(line.startswith(("OK ", "FAIL ")) for line in lines) + sum(tests),
        "failed_cases": [line for line in lines if line.startswith("FAIL ")],
        "findings": FINDING.findall(output)[:SHOWN_LINES],
    }


def is_clean(verdict: dict[str, Any]) -> bool:
    return verdict["errors"] == 0 and verdict["exit_code"] == 0 and verdict["cases"] > 0


def run(command: Sequence[str | Path], timeout: float) -> dict[str, Any]:
    start = time.time()
    # Without torch's cache each tensor has an allocation of its own, and reading past its end is noticed.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    try:
        done = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=timeout, env=environment
        )
        output, exit_code = done.stdout, done.returncode
    except subprocess.TimeoutExpired as stopped:
        output, exit_code = (stopped.stdout or b"").decode(errors="replace"), -1
    return {**judge(output, exit_code), "seconds": round(time.time() - start, 1)}


def report(name: str, verdict: dict[str, Any]) -> dict[str, Any]:
    print(
        f"{'OK' if is_clean(verdict) else 'FAIL'} {name}: {verdict['errors']} errors, {verdict['warnings']} "
        f"warnings, {verdict['cases']} cases, {len(verdict['failed_cases'])} failed, exit code "
        f"{verdict['exit_code']}, {verdict['seconds']} s",
        flush=True,
    )
    return verdict


def main() -> None:
    parser = argparse.ArgumentParser(description="Run compute-sanitizer's tools over a GPU program and kernel tests.")
    parser.add_argument("program", type=Path)
    parser.add_argument("--tests", action="store_true", help="also over some tests of tests/kernels")
    parser.add_argument("--tools", default=",".join(TOOLS))
    parser.add_argument("--out", type=Path, help="write a JSON report")
    parser.add_argument("--commit", help="for the report, where git cannot tell")
    parser.add_argument("--timeout", type=float, default=300, help="seconds for each tool")
    arguments = parser.parse_args()
    sanitizer = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    if sanitizer is None:
        parser.error("compute-sanitizer is not on PATH; it comes with the CUDA toolkit")
    if not arguments.program.is_file():
        parser.error(f"{arguments.program} is not there: build it with `cmake -S kernels -B build/kernels ...`")

    tools = arguments.tools.split(",")
    jobs: dict[str, Sequence[str | Path]] = {
        tool: [sanitizer, "--tool", tool, arguments.program.resolve()] for tool in tools
    }
    for tool in tools:
        if arguments.tests and tool in TESTED_TOOLS:
            pytest = [sys.executable, "-m", "pytest", "-q", *TESTS]
            jobs[f"{tool}, tests"] = [sanitizer, "--tool", tool, *WATCHED, *pytest]
    verdicts: dict[str, dict[str, Any]] = {}
    # At once: they leave most of a GPU and all but one CPU idle.
    with ThreadPoolExecutor(len(jobs)) as pool:
        running = {pool.submit(run, command, arguments.timeout): name for name, command in jobs.items()}
        for done in as_completed(running):
            verdicts[running[done]] = report(running[done], done.result())
            if arguments.out:
                write_report(
                    arguments.out, {name: verdicts[name] for name in jobs if name in verdicts}, arguments.commit
                )
    sys.exit(not all(map(is_clean, verdicts.values())))


def write_report(out: Path, verdicts: dict[str, dict[str, Any]], commit: str | None) -> None:
    import torch

    from flashmla_backend.bench.provenance import provenance, write

    command = ["python", "buildtools/sanitize.py", *sys.argv[1:]]
    write({**provenance(torch.cuda.get_device_name(), command, commit), "tools": verdicts}, out)


if __name__ == "__main__":
    main()
