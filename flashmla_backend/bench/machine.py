"""What the machine itself can do, measured in the same run: the yardstick of every other number."""

from __future__ import annotations

import platform
from dataclasses import dataclass

import torch

from flashmla_backend.bench.problems import Problem
from flashmla_backend.bench.timing import time_calls


@dataclass(frozen=True)
class Machine:
    """A device and its rates."""

    name: str
    sms: int
    l2_bytes: int
    copy_gbs: float  # read and written bytes together
    read_gbs: float
    matmul_tflops: float  # bf16

    def ideal_us(self, problem: Problem) -> float:
        """The time that reading the bytes, or the arithmetic, takes at the measured rates, whichever is longer."""
        return max(problem.bytes / self.read_gbs / 1e3, problem.flops / self.matmul_tflops / 1e6)


def describe(device: torch.device) -> tuple[str, int, int]:
    """Name, multiprocessors (threads on a CPU) and L2 bytes; a CPU's caches are not swept, 0."""
    if device.type != "cuda":
        return platform.processor() or platform.machine(), torch.get_num_threads(), 0
    properties = torch.cuda.get_device_properties(device)
    return properties.name, properties.multi_processor_count, properties.L2_cache_size


def measure(device: torch.device) -> Machine:
    """Copy 4 GiB, read them by a max-reduce, multiply 8192 x 8192 matrices; less on a CPU."""
    size, side = (1 << 32, 8192) if device.type == "cuda" else (1 << 26, 1024)
    source = torch.randint(0, 1 << 30, (size // 4,), dtype=torch.int32, device=device)
    target = torch.empty_like(source)
    copy_us = time_calls([lambda: target.copy_(source)], device).median_us
    read_us = time_calls([lambda: source.max()], device).median_us
    x, y = (torch.randn(side, side, dtype=torch.bfloat16, device=device) for _ in range(2))
    matmul_us = time_calls([lambda: x @ y], device, target_ms=200).median_us
    return Machine(*describe(device), 2 * size / copy_us / 1e3, size / read_us / 1e3, 2 * side**3 / matmul_us / 1e6)
