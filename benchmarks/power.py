"""What long calls and a large matmul take and draw without a pause, and so the energy that their arithmetic costs.

python benchmarks/power.py [--seconds 1.5] [--impls ours,flashmla,fa3] [--out power.json]

Each runs back to back for a while. Of the second half, when the card has settled, it prints the time of a call, the
median of the watts that nvidia-smi samples, and both as picojoules a FLOP: at the card's power limit that, not the
clock, says how fast a kernel can be. Even batches of 128 x 8K; up to 64 rows they wait for memory.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from flashmla_backend.bench.contenders import load
from flashmla_backend.bench.problems import Shape, make_pool, make_problem
from flashmla_backend.bench.provenance import provenance, write
from flashmla_backend.bench.timing import Stopwatch

MATMUL, SIDE = "matmul", 8192
SHAPES = [Shape(heads, s_q, 128, 8192, "fixed") for heads, s_q in ((16, 1), (64, 1), (128, 1), (128, 2), (128, 4))]
SAMPLE_MS = 20
CALLS = 8  # in a graph


class Sample(NamedTuple):
    at: float  # time.monotonic()
    watts: float


def nvidia_smi(device: torch.device, field: str) -> list[str]:
    """The command that prints one field of this device, a number."""
    uuid = torch.cuda.get_device_properties(device).uuid
    return ["nvidia-smi", "-i", f"GPU-{uuid}", f"--query-gpu={field}", "--format=csv,noheader,nounits"]


class Sampler:
    """nvidia-smi beside the calls; a context manager. Raises FileNotFoundError where there is none."""

    def __init__(self, device: torch.device):
        command = [*nvidia_smi(device, "power.draw.instant"), "-lms", str(SAMPLE_MS)]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        self.samples: list[Sample] = []
        self.thread = threading.Thread(target=self._read, daemon=True)

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.samples.append(Sample(time.monotonic(), float(line)))

    def __enter__(self) -> Sampler:
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        self.thread.join()
        self.process.wait()

    def between(self, begin: float, end: float) -> list[float]:
        """Watts."""
        return [sample.watts for sample in self.samples if begin <= sample.at <= end]


def run_for(seconds: float, call: Callable[[], Any], device: torch.device) -> tuple[float, float, float]:
    """Call again and again; microseconds of a call in the second half, and when that began and ended."""
    watch = Stopwatch([call] * CALLS, device)
    begin = time.monotonic()
    while time.monotonic() < begin + seconds / 2:
        watch.measure()
    halfway = time.monotonic()
    times: list[float] = []
    while not times or time.monotonic() < begin + seconds:
        times.append(watch.measure().median_us)
    return statistics.median(times), halfway, time.monotonic()


def measure(
    seconds: float, sampler: Sampler, flops: int, call: Callable[[], Any], device: torch.device
) -> dict[str, Any]:
    us, begin, end = run_for(seconds, call, device)
    samples = sampler.between(begin, end)
    if not samples:
        raise RuntimeError("nvidia-smi said nothing in the meantime: give --seconds more")
    watts, tflops = statistics.median(samples), flops / us / 1e6
    return {
        "us": round(us, 2),
        "tflops": round(tflops, 1),
        "watts": round(watts, 1),
        "pj_per_flop": round(watts / tflops, 3),
        "samples": len(samples),
    }


def measure_all(impls: Sequence[str], seconds: float, device: torch.device) -> list[dict[str, Any]]:
    properties = torch.cuda.get_device_properties(device)
    contenders, missing = load(impls, device)
    for name, why in missing.items():
        print(f"{name} left out: {why}")
    pool = make_pool(SHAPES, properties.L2_cache_size, device)
    x, y = (torch.randn(SIDE, SIDE, dtype=torch.bfloat16, device=device) for _ in range(2))
    rows = []
    print(f"{'heads':>5} {'s_q':>3} {'':10} {'us':>9} {'TFLOP/s':>8} {'GB/s':>6} {'W':>6} {'pJ a FLOP':>10}")

    def keep(row: dict[str, Any]) -> None:
        rows.append(row)
        print(
            f"{row.get('heads', ''):>5} {row.get('s_q', ''):>3} {row['impl']:10} {row['us']:9.1f} {row['tflops']:8.1f}"
            f" {row.get('gbs', 0):6.0f} {row['watts']:6.0f} {row['pj_per_flop']:10.3f}",
            flush=True,
        )

    with Sampler(device) as sampler:
        keep({"impl": MATMUL, **measure(seconds, sampler, 2 * SIDE**3, lambda: x @ y, device)})
        for shape in SHAPES:
            problem = make_problem(pool, shape.lengths(), shape.heads, shape.s_q)
            for contender in contenders:
                (call,) = contender.prepare(problem)
                row: dict[str, Any] = {"heads": shape.heads, "s_q": shape.s_q, "impl": contender.name}
                row |= measure(seconds, sampler, problem.flops, call, device)
                keep({**row, "gbs": round(problem.bytes / float(row["us"]) / 1e3, 1)})
    return rows


def main() -> None:
    first, _, rest = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(
        description=first, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=1.5, help="how long each runs")
    parser.add_argument("--impls", default="ours,flashmla,fa3", help="contenders, as of flashmla bench kernels")
    parser.add_argument("--out", type=Path, help="write a JSON report")
    parser.add_argument("--commit", help="for the report, where git cannot tell")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("no GPU here: what is measured is a GPU's power")
    device = torch.device("cuda", torch.cuda.current_device())
    rows = measure_all(arguments.impls.split(","), arguments.seconds, device)
    if arguments.out:
        name = torch.cuda.get_device_name(device)
        report = provenance(name, ["python", "benchmarks/power.py", *sys.argv[1:]], arguments.commit)
        limit = float(subprocess.check_output(nvidia_smi(device, "power.limit"), text=True))
        write({**report, "power_limit_w": [limit], "rows": rows}, arguments.out)


if __name__ == "__main__":
    main()
