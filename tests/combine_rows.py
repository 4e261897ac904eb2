"""What the tests of the emulated combine kernels share: outputs of a batch of which some requests were cut."""

from __future__ import annotations

import subprocess
from collections.abc import Iterable
from pathlib import Path

import torch


def combined(program: Path, head: Iterable[int], data: Iterable[str]) -> torch.Tensor:
    """LSE, then 512 values of the output, of every row: [B * rows, 513] fp64; NaN for those of whole requests."""
    lines = [" ".join(map(str, head)), *data]
    done = subprocess.run([program], input="\n".join(lines), capture_output=True, text=True, check=True)
    rows = [[float(x) for x in line.split()] for line in done.stdout.splitlines()]
    return torch.tensor(rows, dtype=torch.float64)


def in_column_order(values: torch.Tensor, few_rows: bool) -> torch.Tensor:
    """[rows, 2, 256]: of 32 columns, which four vectors of eight hold, each has every fourth pair.

    From the kernel of few rows these columns are two times sixteen neighbours, from two tiles of 64.
    """
    if not few_rows:
        return values.unflatten(-1, (8, 4, 4, 2)).transpose(-3, -2).flatten(-4)
    by_vector = values.unflatten(-1, (4, 2, 4, 2, 2, 2))  # warp, tiles, quad, tile, block, column
    return by_vector.movedim((-5, -3, -6, -2, -4), (-6, -5, -4, -3, -2)).flatten(-6)
