"""What FLASHMLA_CHECK_BOUNDS=1 costs: decode steps with and without it, taking turns in one run.

python benchmarks/bounds_cost.py [--layers 27] [--out bounds-cost.json]

A step is one plan and all layers, in a CUDA graph; each number is the median over turns. On a CPU it only shows that it
runs: there Python looks at every length.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch

import flashmla_backend
from flashmla_backend.bench.timing import Stopwatch
from flashmla_backend.bounds import VARIABLE

TURNS, TURN_MS = 7, 20
PAGE = 64


class Shape(NamedTuple):
    heads: int
    s_q: int
    batch: int
    length: int  # the mean: lengths are spread evenly from a half to three halves of it

    def lengths(self) -> list[int]:
        return [self.length * (2 * self.batch + 4 * i + 2) // (4 * self.batch) for i in range(self.batch)]


SHAPES = [
    Shape(16, 1, 1, 1024),
    Shape(16, 1, 1, 131072),
    Shape(16, 1, 8, 4096),
    Shape(16, 1, 128, 1024),
    Shape(128, 1, 1, 4096),
    Shape(128, 1, 32, 4096),
    Shape(128, 1, 128, 2048),
    Shape(128, 2, 64, 4096),
]


def stopwatch(shape: Shape, layers: int, device: torch.device, checked: bool) -> Stopwatch:
    """Of one step: a plan in buffers that exist, then its layers."""
    dtype = torch.bfloat16
    seq_lens = torch.tensor(shape.lengths(), dtype=torch.int32, device=device)
    width = -(-max(shape.lengths()) // PAGE)
    pages = shape.batch * width
    block_table = torch.randperm(pages, device=device).int().view(shape.batch, width)
    kv_cache = torch.zeros(pages, PAGE, 1, 576, dtype=dtype, device=device).normal_()
    q = torch.randn(shape.batch, shape.s_q, shape.heads, 576, dtype=dtype, device=device)

    def make_plan(reuse: flashmla_backend.DecodePlan | None = None) -> flashmla_backend.DecodePlan:
        return flashmla_backend.plan_decode(
            seq_lens, block_table, s_q=shape.s_q, h_q=shape.heads, num_pages=pages, reuse=reuse
        )

    with patch.dict(os.environ, {VARIABLE: str(int(checked))}):
        plan = make_plan()

    def layer() -> Any:
        return flashmla_backend.mla_decode(q, kv_cache, plan, softmax_scale=0.05)

    calls: list[Callable[[], Any]] = [lambda: make_plan(plan), *[layer] * layers]
    return Stopwatch(calls, device)


def measure(shape: Shape, layers: int, device: torch.device) -> dict[str, Any]:
    watches = {name: stopwatch(shape, layers, device, name == "on") for name in ("off", "on")}
    turns: dict[str, list[float]] = {name: [] for name in watches}
    for _ in range(TURNS):
        for name, watch in watches.items():
            turns[name].append(watch.measure(TURN_MS).median_us * (layers + 1))
    off, on = (statistics.median(turns[name]) for name in ("off", "on"))
    return {**shape._asdict(), "off_us": round(off, 2), "on_us": round(on, 2), "ratio": round(on / off, 4)}


def main() -> None:
    parser = argparse.ArgumentParser(description=f"Measure what {VARIABLE}=1 costs a decode step.")
    parser.add_argument("--layers", type=int, default=27)
    parser.add_argument("--out", type=Path, help="write a JSON report")
    parser.add_argument("--commit", help="for the report, where git cannot tell")
    arguments = parser.parse_args()
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
    rows = []
    print(f"heads s_q batch length    off us     on us   ratio   ({arguments.layers} layers a step)")
    for shape in SHAPES if on_gpu else [SHAPES[0]]:
        row = measure(shape, arguments.layers, device)
        rows.append(row)
        print(
            "{heads:5d} {s_q:3d} {batch:5d} {length:6d} {off_us:9.1f} {on_us:9.1f} {ratio:7.4f}".format(**row),
            flush=True,
        )
    mean = statistics.geometric_mean(row["ratio"] for row in rows)
    print(f"on / off: geometric mean {mean:.4f}, most {max(row['ratio'] for row in rows):.4f}")
    if arguments.out:
        from flashmla_backend.bench.provenance import provenance, write

        name = torch.cuda.get_device_name() if on_gpu else "CPU"
        report = provenance(name, ["python", "benchmarks/bounds_cost.py", *sys.argv[1:]], arguments.commit)
        write({**report, "layers": arguments.layers, "geometric_mean": round(mean, 4), "steps": rows}, arguments.out)


if __name__ == "__main__":
    main()
