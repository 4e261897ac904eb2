"""Isolation and batch invariance of our kernels and of the rivals that are installed, in one run on a GPU.

python benchmarks/trust.py [--out trust.json]

Table entries that name no page may crash a rival or poison CUDA in its process: those cases run in children.
"""

from __future__ import annotations

import argparse
import inspect
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

import flashmla_backend
from flashmla_backend.bench import contenders, machine, trust
from flashmla_backend.bench.contenders import Call, Prepare
from flashmla_backend.bench.problems import Problem

OURS, INVARIANT = "ours", "ours, batch-invariant"
NAMES = {OURS: OURS, INVARIANT: OURS, "FlashMLA": "flashmla", "FA3": "fa3", "FlashInfer": "flashinfer"}
CHILD_S = 60


def invariant(problem: Problem) -> list[Call]:
    options: dict[str, Any] = {"s_q": problem.s_q, "h_q": problem.heads, "batch_invariant": True}
    plan = flashmla_backend.plan_decode(problem.seq_lens, problem.block_tables[0], **options)
    q, cache, scale = problem.queries[0], problem.cache, problem.softmax_scale
    return [lambda: flashmla_backend.mla_decode(q, cache, plan, softmax_scale=scale)[0]]


def load(name: str, device: torch.device) -> Prepare:
    """Raises an error that says why, if it cannot run here."""
    if name == INVARIANT:
        if "batch_invariant" not in inspect.signature(flashmla_backend.plan_decode).parameters:
            raise contenders.Unavailable("plan_decode has no batch_invariant")
        return invariant
    found, reasons = contenders.load([NAMES[name]], device)
    if not found:
        raise contenders.Unavailable(reasons[NAMES[name]])
    return found[0].prepare


def start_child(name: str, device: str) -> subprocess.Popen[str]:
    command = [sys.executable, __file__, "--device", device, "--out-of-range", name]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def result_of(child: subprocess.Popen[str], name: str) -> dict[str, Any]:
    """The row that the child printed last, or how it ended."""
    try:
        output, _ = child.communicate(timeout=CHILD_S)
    except subprocess.TimeoutExpired:
        child.kill()
        output = "did not end"
    lines = output.strip().splitlines() or [""]
    if child.returncode == 0:
        row: dict[str, Any] = json.loads(lines[-1])
        return row
    error = f"exit code {child.returncode}: {lines[-1][:200]}"
    return {"case": trust.OUT_OF_RANGE, "contender": name, "cases": 0, "changed": 0, "error": error}


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare isolation and batch invariance with those of the rivals.")
    parser.add_argument("--out", type=Path, help="write a JSON report")
    parser.add_argument("--commit", help="for the report, where git cannot tell")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out-of-range", metavar="NAME", help="this contender's cases of a child")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    if arguments.out_of_range:
        name = arguments.out_of_range
        print(json.dumps(trust.out_of_range(load(name, device), device).row(trust.OUT_OF_RANGE, name)))
        return

    started = time.time()
    loaded: dict[str, Prepare] = {}
    notes: dict[str, str] = {}
    for name in NAMES:
        try:
            loaded[name] = load(name, device)
        except contenders.Unavailable as error:
            notes[name] = str(error)
            print(f"{name}: not here: {error}", flush=True)
    children = {name: start_child(name, arguments.device) for name in loaded}
    with torch.inference_mode():
        rows = trust.isolation(loaded, device)
        rows += [result_of(child, name) for name, child in children.items()]
        rows += trust.invariance(loaded, device)
    for row in rows:
        if "error" in row:
            print(f"{row['contender']}, {row['case']}: {row['error']}")
    print(trust.markdown({"rows": rows}))
    if arguments.out:
        from flashmla_backend.bench.provenance import provenance, write

        command = ["python", "benchmarks/trust.py", *sys.argv[1:]]
        where = provenance(machine.describe(device)[0], command, arguments.commit)
        wall_s = round(time.time() - started, 1)
        write({**where, "wall_s": wall_s, "notes": notes, "rows": rows}, arguments.out)
    print(f"{time.time() - started:.0f} s")


if __name__ == "__main__":
    main()
