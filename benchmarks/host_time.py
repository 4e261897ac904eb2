"""Host time of the API on a GPU: how long Python and the launches take before the kernels can start.

python benchmarks/host_time.py [--batch 8] [--out host-time.json]

Each number is the median over bursts of calls, started on an idle GPU and short enough never to fill its queue.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import torch

import flashmla_backend
from flashmla_backend import native

BURSTS, CALLS = 30, 40
LENGTH, PAGE, HEADS = 1024, 64, 16


def microseconds(call: Callable[[], object]) -> float:
    times = []
    for _ in range(BURSTS):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(CALLS):
            call()
        times.append((time.perf_counter() - start) / CALLS * 1e6)
    return statistics.median(times)


def native_call(name: str, call: Callable[[], object]) -> Callable[[], None]:
    """The compiled module's `name` with the arguments that `call` hands to it."""
    module = native.load()
    with patch.object(module, name) as launch:
        call()
    arguments = launch.call_args.args
    return lambda: getattr(module, name)(*arguments)


def measure(batch: int) -> dict[str, float]:
    pages = batch * LENGTH // PAGE
    seq_lens = torch.full((batch,), LENGTH, dtype=torch.int32, device="cuda")
    block_table = torch.randperm(pages, device="cuda").int().view(batch, -1)
    kv_cache = torch.randn(pages, PAGE, 1, 576, device="cuda", dtype=torch.bfloat16)
    q = torch.randn(batch, 1, HEADS, 576, device="cuda", dtype=torch.bfloat16)

    def make_plan(reuse: flashmla_backend.DecodePlan | None = None) -> flashmla_backend.DecodePlan:
        return flashmla_backend.plan_decode(seq_lens, block_table, s_q=1, h_q=HEADS, reuse=reuse)

    def views() -> flashmla_backend.DecodePlan:
        return flashmla_backend.plan_decode(seq_lens[:], block_table[:], s_q=1, h_q=HEADS, reuse=plan)

    def decode() -> tuple[torch.Tensor, torch.Tensor]:
        return flashmla_backend.mla_decode(q, kv_cache, plan, softmax_scale=0.1)

    def allocate() -> None:
        q.new_empty((batch, 1, HEADS, 512))
        q.new_empty((batch, 1, HEADS), dtype=torch.float32)

    plan = make_plan()
    decode()  # loads the kernels
    return {
        "plan_decode": microseconds(make_plan),
        "plan_decode, reuse": microseconds(lambda: make_plan(plan)),
        "plan_decode, reuse, new views of the inputs": microseconds(views),
        "  its launch alone": microseconds(native_call("schedule", lambda: make_plan(plan))),
        "mla_decode": microseconds(decode),
        "  its two launches alone": microseconds(native_call("decode", decode)),
        "  its two allocations alone": microseconds(allocate),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure the host time of plan_decode and mla_decode.")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--out", type=Path, help="write a JSON report")
    parser.add_argument("--commit", help="for the report, where git cannot tell")
    arguments = parser.parse_args()
    times = measure(arguments.batch)
    for name, us in times.items():
        print(f"{us:8.1f} us  {name}")
    if arguments.out:
        from flashmla_backend.bench.provenance import provenance, write

        command = ["python", "benchmarks/host_time.py", *sys.argv[1:]]
        report = provenance(torch.cuda.get_device_name(), command, arguments.commit)
        host_us = {name.strip(): round(us, 2) for name, us in times.items()}
        write({**report, "batch": arguments.batch, "host_us": host_us}, arguments.out)


if __name__ == "__main__":
    main()
