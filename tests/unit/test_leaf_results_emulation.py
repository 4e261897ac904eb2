"""What the kernels make of leaves in batch-invariant mode, on the CPU: the same bits wherever a request is cut."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from flashmla_backend.leaves import leaf_count
from tests.emulators import build, needs_compiler

pytestmark = needs_compiler


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("leaf_results", tmp_path_factory.mktemp("emulation"))


@pytest.mark.parametrize("fp16", [False, True])
@pytest.mark.parametrize(
    "most, pages, rows",
    [
        (128, 1, 1),
        (128, 8, 64),
        (128, 20, 16),
        (128, 64, 37),
        (128, 3000, 5),
        (128, 9, 32),
        (128, 40, 33),
        (64, 200, 64),
        (16, 300, 64),
    ],
)
def test_bits_are_those_of_the_request_uncut(program: Path, most: int, pages: int, rows: int, fp16: bool) -> None:
    """Scores alike, apart and far apart; O of any magnitude that the output holds; some rows see no token."""
    seeds = range(3) if fp16 else range(4)  # the last one's O is as large as 2^60
    cases = "\n".join(f"{pages} {rows} {most} {seed} {seed % 2} {int(fp16)}" for seed in seeds)
    done = subprocess.run([program], input=cases, capture_output=True, text=True, check=True)
    lines = [line.split() for line in done.stdout.splitlines()]
    assert len(lines) == len(seeds)
    for leaves, other_bits, other_scales, error, lse_error in lines:
        assert int(leaves) == leaf_count(pages, most)
        assert (int(other_bits), int(other_scales)) == (0, 0)
        assert float(error) < (4.0 if fp16 else 1.3)  # of the output's own rounding; leaves are fp16 too
        assert float(lse_error) < 2e-5
