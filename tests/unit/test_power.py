"""benchmarks/power.py and the table made from its report, without a GPU."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import performance_power
import performance_reports
import power
import pytest
import torch

ROOT = Path(__file__).parents[2]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: it would be measured")
def test_without_a_gpu_it_says_so() -> None:
    command = [sys.executable, ROOT / "benchmarks" / "power.py"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and "no GPU here" in done.stderr


def test_samples_count_from_the_first_moment_to_the_last() -> None:
    sampler = power.Sampler.__new__(power.Sampler)  # without nvidia-smi
    sampler.samples = [power.Sample(at, 100.0 * at) for at in (1.0, 2.0, 3.0, 4.0)]
    assert sampler.between(2.0, 3.0) == [200.0, 300.0]
    assert sampler.between(5.0, 6.0) == []


def test_calls_are_timed_in_the_second_half() -> None:
    began: list[float] = []
    us, halfway, end = power.run_for(0.02, lambda: began.append(time.monotonic()), torch.device("cpu"))
    assert us > 0 and began[0] < halfway < began[-1] < end
    assert len(began) % power.CALLS == 0


def test_the_table_holds_every_row_against_the_matmul() -> None:
    rows: list[dict[str, Any]] = [
        {"impl": power.MATMUL, "tflops": 600.0, "watts": 690.0, "pj_per_flop": 1.15},
        {"impl": "ours", "heads": 128, "s_q": 2, "tflops": 540.0, "watts": 702.4, "pj_per_flop": 1.3, "gbs": 1234.5},
    ]
    report = {"device": "GPU", "power_limit_w": [700.0], "rows": rows}
    head, _, matmul, ours = performance_power.power(performance_reports.load()._replace(power=report)).splitlines()
    assert head.startswith("| GPU, 700 W |")
    assert matmul == "| 8192 x 8192 x 8192 | matmul | 600 | 100% | - | 690 | 1.15 |"
    assert ours == "| 128 heads, s_q 2 | ours | 540 | 90% | 1234 | 702 | 1.30 |"
