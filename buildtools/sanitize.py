"""Run compute-sanitizer's tools over a GPU program: `python buildtools/sanitize.py PROGRAM --out FILE.json`.

PROGRAM prints one line for each case, "OK ..." or "FAIL ...", as flashmla_decode_smoke does. Exit code 1 if a tool
finds an error, or a case fails under it.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

TOOLS = ("memcheck", "racecheck", "synccheck", "initcheck")
SUMMARY = re.compile(
    r"^========= (?:ERROR SUMMARY: (\d+) error|RACECHECK SUMMARY: .*\((\d+) errors?, (\d+) warnings?\))", re.MULTILINE
)
FINDING = re.compile(r"^========= +(?!COMPUTE-SANITIZER|ERROR SUMMARY|RACECHECK SUMMARY)(\S.*)$", re.MULTILINE)
SHOWN_LINES = 40


def judge(output: str, exit_code: int) -> dict[str, Any]:
    """What a tool's output says: errors (None if it never came to its summary), warnings, and the program's cases."""
    summary = SUMMARY.search(output)
    errors = summary and int(summary[1] or summary[2] or 0)
    lines = output.splitlines()
    return {
        "errors": errors,
        "warnings": int(summary[3] or 0) if summary else 0,
        "exit_code": exit_code,
        "cases": sum(line.startswith(("OK ", "FAIL ")) for line in lines),
        "failed_cases": [line for line in lines if line.startswith("FAIL ")],
        "findings": FINDING.findall(output)[:SHOWN_LINES],
    }


def is_clean(verdict: dict[str, Any]) -> bool:
    return verdict["errors"] == 0 and verdict["exit_code"] == 0 and verdict["cases"] > 0


def run(sanitizer: str, tool: str, program: Path, timeout: float) -> dict[str, Any]:
    start = time.time()
    command = [sanitizer, "--tool", tool, str(program)]
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=timeout)
        output, exit_code = done.stdout, done.returncode
    except subprocess.TimeoutExpired as stopped:
        output, exit_code = (stopped.stdout or b"").decode(errors="replace"), -1
    return {**judge(output, exit_code), "seconds": round(time.time() - start, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description="Run compute-sanitizer's tools over a GPU program.")
    parser.add_argument("program", type=Path)
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

    verdicts = {}
    for tool in arguments.tools.split(","):
        verdict = verdicts[tool] = run(sanitizer, tool, arguments.program.resolve(), arguments.timeout)
        print(
            f"{'OK' if is_clean(verdict) else 'FAIL'} {tool}: {verdict['errors']} errors, {verdict['warnings']} "
            f"warnings, {verdict['cases']} cases, {len(verdict['failed_cases'])} failed, exit code "
            f"{verdict['exit_code']}, {verdict['seconds']} s",
            flush=True,
        )
    if arguments.out:
        import torch

        from flashmla_backend.bench.provenance import provenance, write

        command = ["python", "buildtools/sanitize.py", *sys.argv[1:]]
        write({**provenance(torch.cuda.get_device_name(), command, arguments.commit), "tools": verdicts}, arguments.out)
    sys.exit(not all(map(is_clean, verdicts.values())))


if __name__ == "__main__":
    main()
