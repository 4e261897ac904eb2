"""What small pages cost: the same requests in pages of 16, 32, 64 and 128 tokens, taking turns in one run.

python benchmarks/page_sizes.py [--page-size 16 32 64 128] [--out page-sizes.json]

First the same tokens are decoded in every page size: one answer is compared with the oracle, the others with it bit for
bit. Then whole calls are timed, each number the median over turns, in CUDA graphs over shuffled pages larger than L2.
On a CPU it only shows that it runs.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from flashmla_backend import mla_decode, plan_decode, reference
from flashmla_backend.bench.problems import Shape, make_pool
from flashmla_backend.bench.timing import Stopwatch
from flashmla_backend.paging import D_QK, PAGE_SIZES
from flashmla_backend.schedule import TILE_TOKENS
from flashmla_backend.workspace import workspace_size

TURNS, TURN_MS = 5, 20
SCALE = D_QK**-0.5
COMPARED_WITH = TILE_TOKENS
SHAPES = [Shape(heads, 1, b, n, "fixed") for heads in (16, 128) for b in (1, 32, 128) for n in (1024, 8192)]

Call = Callable[[], tuple[torch.Tensor, torch.Tensor]]


class Bench:
    """One shape over the pool [P, 64, 1, 576], which holds pages of any size."""

    def __init__(self, shape: Shape, pool: torch.Tensor, rotations: int) -> None:
        self.shape, self.pool, self.rotations = shape, pool, rotations
        device = pool.device
        self.seq_lens = torch.tensor(shape.lengths(), dtype=torch.int32, device=device)
        self.q = torch.randn(shape.batch, shape.s_q, shape.heads, D_QK, device=device).bfloat16()
        size = workspace_size(device, s_q=shape.s_q, h_q=shape.heads)
        self.workspace = torch.empty(size, dtype=torch.float32, device=device)

    def tables(self, page_size: int) -> torch.Tensor:
        """[rotations, B, W] int32: no page twice, all shuffled."""
        width = -(-self.shape.length // page_size)
        ids = torch.randperm(self.pool.shape[0] * TILE_TOKENS // page_size, device=self.pool.device).int()
        return ids[: self.rotations * self.shape.batch * width].view(self.rotations, self.shape.batch, width)

    def call(self, page_size: int, table: torch.Tensor) -> Call:
        """A layer of a plan that is made here."""
        shape, cache = self.shape, self.pool.view(-1, page_size, 1, D_QK)
        plan = plan_decode(
            self.seq_lens,
            table,
            s_q=shape.s_q,
            h_q=shape.heads,
            page_size=page_size,
            workspace=self.workspace,
            num_pages=cache.shape[0],
        )
        return lambda: mla_decode(self.q, cache, plan, softmax_scale=SCALE)

    def check(self, page_sizes: list[int]) -> None:
        """Raises RuntimeError unless all page sizes give the same bits and the first request's are right."""
        largest = max(page_sizes)
        table = self.tables(largest)[0]
        expected = None
        for page_size in page_sizes:
            parts = largest // page_size
            ids = table[:, :, None] * parts + torch.arange(parts, dtype=torch.int32, device=table.device)
            out, lse = self.call(page_size, ids.flatten(1))()
            if expected is None:
                expected = out, lse
                self.compare_with_oracle(out, page_size, ids.flatten(1))
            elif not (torch.equal(out, expected[0]) and torch.equal(lse, expected[1])):
                raise RuntimeError(f"{self.shape}: pages of {page_size} and of {page_sizes[0]} tokens give other bits")

    def compare_with_oracle(self, out: torch.Tensor, page_size: int, table: torch.Tensor) -> None:
        cache = self.pool.view(-1, page_size, 1, D_QK)
        right, _ = reference.mla_decode(self.q[:1], cache, table[:1], self.seq_lens[:1], softmax_scale=SCALE)
        error = float((out[:1].double() - right).norm() / right.norm())
        if not error < 1e-2:
            raise RuntimeError(f"{self.shape}, pages of {page_size}: relative error {error:.3g}")

    def measure(self, page_sizes: list[int]) -> dict[str, float]:
        """Microseconds of a call, by page size."""
        watches = {
            size: Stopwatch([self.call(size, table) for table in self.tables(size)], self.pool.device)
            for size in page_sizes
        }
        turns: dict[int, list[float]] = {size: [] for size in page_sizes}
        for _ in range(TURNS):
            for size, watch in watches.items():
                turns[size].append(watch.measure(TURN_MS).median_us)
        return {str(size): round(statistics.median(turns[size]), 2) for size in page_sizes}


def print_table(rows: list[dict[str, Any]], page_sizes: list[int]) -> dict[str, float]:
    """Microseconds, and the ratio to pages of 64 tokens; returns the ratios' geometric means."""
    others = [size for size in page_sizes if size != COMPARED_WITH]
    print("heads batch length" + "".join(f"{f'{size} us':>10}" for size in page_sizes), end="")
    print("".join(f"{f'{size}/{COMPARED_WITH}':>9}" for size in others))
    ratios: dict[str, list[float]] = {str(size): [] for size in others}
    for row in rows:
        print(f"{row['heads']:5d} {row['batch']:5d} {row['length']:6d}", end="")
        print("".join(f"{row['us'][str(size)]:10.2f}" for size in page_sizes), end="")
        for size, of_size in ratios.items():
            of_size.append(row["us"][size] / row["us"][str(COMPARED_WITH)])
            print(f"{of_size[-1]:9.4f}", end="")
        print()
    means = {size: round(statistics.geometric_mean(of_size), 4) for size, of_size in ratios.items()}
    for size, mean in means.items():
        print(f"pages of {size} / {COMPARED_WITH}: geometric mean {mean:.4f}, most {max(ratios[size]):.4f}")
    return means


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure what the page size costs a decode call.")
    parser.add_argument("--page-size", type=int, nargs="+", choices=PAGE_SIZES, default=[16, 32, 64, 128])
    parser.add_argument("--out", type=Path, help="write a JSON report")
    parser.add_argument("--commit", help="for the report, where git cannot tell")
    arguments = parser.parse_args()
    page_sizes = sorted({*arguments.page_size, COMPARED_WITH})
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
    l2_bytes = torch.cuda.get_device_properties(device).L2_cache_size if on_gpu else 0
    shapes = SHAPES if on_gpu else SHAPES[:1]
    pool = make_pool(shapes, l2_bytes, device)
    torch.manual_seed(0)
    rows = []
    for shape in shapes:
        bench = Bench(shape, pool, shape.rotations(l2_bytes))
        bench.check(page_sizes)
        rows.append(
            {"heads": shape.heads, "batch": shape.batch, "length": shape.length, "us": bench.measure(page_sizes)}
        )
    means = print_table(rows, page_sizes)
    if arguments.out:
        from flashmla_backend.bench.provenance import provenance, write

        name = torch.cuda.get_device_name() if on_gpu else "CPU"
        report = provenance(name, ["python", "benchmarks/page_sizes.py", *sys.argv[1:]], arguments.commit)
        write({**report, "geometric_mean": means, "calls": rows}, arguments.out)


if __name__ == "__main__":
    main()
