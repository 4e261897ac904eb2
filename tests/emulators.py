"""Programs of tests/emulation, which run the kernels' own code on the CPU."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
INCLUDES = ("tests/emulation/stubs", "tests/emulation", "kernels", "kernels/include")
# A fortified longjmp refuses to change stacks; kernels look at the bits of numbers.
FLAGS = ("-std=c++17", "-O2", "-U_FORTIFY_SOURCE", "-fno-strict-aliasing", "-Wno-unknown-pragmas")
WARNINGS = ("-Wall", "-Wextra", "-Werror")

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ to compile the emulation with")


def build(name: str, folder: Path) -> Path:
    """Compile tests/emulation/NAME.cpp into `folder`."""
    program = folder / name
    source = ROOT / "tests" / "emulation" / f"{name}.cpp"
    includes = [f"-I{ROOT / include}" for include in INCLUDES]
    subprocess.run(["g++", *FLAGS, *WARNINGS, *includes, str(source), "-o", str(program)], check=True)
    return program
