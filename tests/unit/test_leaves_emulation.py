"""The decode kernel's own walk over leaves, on the CPU, against the specification."""

from __future__ import annotations

import random
import shutil
import subprocess
from pathlib import Path

import pytest

from flashmla_backend import leaves

ROOT = Path(__file__).parents[2]


@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ to compile the emulation with")
def test_the_kernel_walks_over_the_leaves_of_the_specification(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "leaves"
    includes = [f"-I{ROOT / 'kernels'}", f"-I{ROOT / 'kernels' / 'include'}"]
    flags = ["-std=c++17", "-O1", "-U_FORTIFY_SOURCE", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]
    source = str(ROOT / "tests/emulation/leaves.cpp")
    subprocess.run(["g++", *flags, *includes, source, "-o", str(program)], check=True)
    numbers = random.Random(0)
    many = [*range(1, 400), 2**25 - 1, 2**25, *(numbers.randint(1, 2**25) for _ in range(300))]
    cases = [(pages, most) for pages in many for most in (1, 2, 16, 64, 128)]
    text = "\n".join(f"{pages} {most}" for pages, most in cases)
    lines = subprocess.run([program], input=text, capture_output=True, text=True, check=True).stdout.splitlines()
    monkeypatch.setattr(leaves, "merge", lambda first, second: f"({first}+{second})")
    for (pages, most), line in zip(cases, lines, strict=True):
        *ends, tree = line.split()
        assert [int(end) for end in ends] == [end for _, end in leaves.leaves_of(pages, 0, pages, most)], (pages, most)
        assert tree == leaves.merge_halves([str(i) for i in range(len(ends))]), (pages, most)
