"""Check what the compiler made of the kernels, without a GPU: `python buildtools/check_kernels.py`. Exit code 1 if
anything is wrong.

Every kernel: no register spills and none of ptxas's complaints that mean a slow or a wrong Hopper kernel. Kernels in
`RULES`: the instructions that their design stands on, and none that would undo it. Shared memory within an SM's.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

import toolkit

KERNELS = Path(__file__).parent.parent / "kernels"
MAX_SHARED_BYTES = 232_448  # what a thread block may ask for on compute capability 9.0
SLACK = 1024  # for aligning the tiles

# What ptxas says when it takes a wgmma or a setmaxnreg otherwise than it was meant.
BAD_CODES = {
    "C7507": "setmaxnreg is ignored",
    "C7508": "setmaxnreg is ignored",
    "C7510": "wgmma is serialised",
    "C7511": "wgmma is serialised",
    "C7512": "wgmma is serialised",
    "C7602": "too few registers for wgmma",
}

LOCAL_MEMORY = ("LDL", "STL")
SHOWN = ("HGMMA", "UTMALDG", "USETMAXREG", "LDL", "STL")


@dataclass(frozen=True)
class Rule:
    """SASS opcodes (their first word) that a kernel must and must not contain."""

    required: tuple[str, ...] = ()
    forbidden: tuple[str, ...] = LOCAL_MEMORY
    waits: int = 0  # for the kernel before, as many as there are ways to where it matters
    waits_before_launch: bool = False  # the next kernel may start only when this one has waited
    waits_before_reading: bool = False  # in every role
    steps_apart: int = 0  # of P V, each behind exponentials of its own; not in batch-invariant mode


# Each role waits by itself: two sides, who loads Q, and who loads halves of pages of three kinds.
FEW_ROWS = Rule(
    required=("HGMMA", "UTMALDG", "USETMAXREG", "SYNCS", "FENCE"),
    waits=9,
    waits_before_launch=True,
    waits_before_reading=True,
)
RULES = {
    "decode_kernel": replace(FEW_ROWS, steps_apart=4),
    "decode_few_rows_kernel": FEW_ROWS,
    # Where nothing was cut, too.
    "combine_kernel": Rule(waits=2),
    "combine_leaves_kernel": Rule(waits=2),
    "schedule_kernel": Rule(forbidden=(), waits=1, waits_before_launch=True),
    "check_bounds_kernel": Rule(waits=1),
    "empty_stale_kernel": Rule(waits=1),
}
WAIT, LAUNCH = "ACQBULK", "PREEXIT"  # griddepcontrol.wait and .launch_dependents
READ, ROLE, END = "LDG", "USETMAXREG", "EXIT"  # of global memory; with what the code of a role begins, and ends
VALUES, EXPONENTIAL = "HGMMA.64x256", "MUFU.EX2"  # a step of P V


@dataclass
class Kernel:
    """One compiled entry function."""

    name: str
    element: str  # "bf16", "fp16" or ""
    registers: int = 0
    spills: int = 0  # bytes stored and loaded
    static_shared: int = 0  # bytes
    opcodes: Counter[str] = field(default_factory=Counter)
    early_reads: int = 0  # of global memory, before its role has waited for the kernel before
    batch_invariant: bool = False
    steps_apart: int = 0  # of P V, between which and the one before there are exponentials

    def faults(self) -> list[str]:
        """What is wrong with it, in words."""
        rule = RULES.get(self.name, Rule(forbidden=()))
        label = f"{self.name} {self.element}".strip()
        found = [f"{label}: {self.spills} bytes of register spills"] if self.spills else []
        found += [f"{label}: no {opcode} in its SASS" for opcode in rule.required if not self.opcodes[opcode]]
        if rule.waits != (waits := self.opcodes[WAIT]) and self.name in RULES:
            found.append(f"{label}: waits for the kernel before in {waits} places, not in {rule.waits}")
        order = [opcode for opcode in self.opcodes if opcode in (WAIT, LAUNCH)]  # in order of appearance
        if rule.waits_before_launch and order != [WAIT, LAUNCH]:
            found.append(f"{label}: lets the next kernel start before it has waited itself, or not at all")
        if rule.waits_before_reading and self.early_reads:
            found.append(f"{label}: reads global memory before it has waited for the kernel before")
        if self.steps_apart < rule.steps_apart and not self.batch_invariant:
            found.append(f"{label}: works out exponentials of several steps of P V before it starts the first of them")
        found += [
            f"{label}: {self.opcodes[opcode]} x {opcode} in its SASS"
            for opcode in rule.forbidden
            if self.opcodes[opcode]
        ]
        return found


def demangle(symbol: str) -> tuple[str, str]:
    """The function's own name and its element type: _ZN8flashmla13decode_kernelI6__halfEE.. -> decode_kernel, fp16."""
    rest, names = symbol.removeprefix("_Z").removeprefix("N"), []
    while length := re.match(r"\d+", rest):
        end = length.end() + int(length[0])
        names.append(rest[length.end() : end])
        rest = rest[end:]
    element = re.match(r"I\d+__(nv_bfloat16|half)", rest)
    return names[-1] if names else symbol, {"nv_bfloat16": "bf16", "half": "fp16"}[element[1]] if element else ""


def read_log(log: str) -> tuple[dict[str, Kernel], list[str]]:
    """Entry functions by symbol from `ptxas -v`, and ptxas's complaints as faults."""
    kernels = {}
    for block in log.split("Compiling entry function '")[1:]:
        symbol = block.partition("'")[0]
        name, element = demangle(symbol)
        kernel = kernels[symbol] = Kernel(name, element)
        kernel.batch_invariant = bool(re.search(r"decode_kernelI\d+__\w+?Lb1", symbol))
        kernel.spills = sum(map(int, re.findall(r"(\d+) bytes spill", block)))
        kernel.registers = int(re.search(r"Used (\d+) registers", block)[1])  # type: ignore[index]
        if shared := re.search(r"(\d+) bytes smem", block):
            kernel.static_shared = int(shared[1])
    faults = [
        f"ptxas {code}, {BAD_CODES[code]}: {line.strip()}"
        for line in log.splitlines()
        for code in BAD_CODES
        if re.search(rf"\b{code}\b", line)
    ]
    return kernels, faults


def read_sass(sass: str, kernels: dict[str, Kernel]) -> None:
    """Count opcodes (their first word), early reads and steps of `kernels`, by symbol, in nvdisasm's listing."""
    kernel: Kernel | None = None
    waited = exponentials = False
    for line in sass.splitlines():
        if section := re.match(r"\.text\.(\S+):", line):
            kernel = kernels.get(section[1])
            waited = exponentials = False
        elif kernel and (op := re.match(r"\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*)", line)):
            opcode = op[1]
            kernel.opcodes[opcode] += 1
            waited = opcode == WAIT or (waited and opcode != ROLE and not (opcode == END and "@" not in line))
            kernel.early_reads += opcode == READ and not waited
            step = VALUES in line
            kernel.steps_apart += step and exponentials
            exponentials = EXPONENTIAL in line or (exponentials and not step)


def compile_cubin(nvcc: Path, includes: Iterable[Path], source: Path, cubin: Path) -> str:
    """Compile one source for sm_90a with the options of a release build; returns ptxas's log."""
    options = [
        "-std=c++17",
        "-O3",
        "-DNDEBUG",
        "-arch=sm_90a",
        "-Xptxas",
        "-v",
        *(f"-I{folder}" for folder in includes),
    ]
    command = [str(nvcc), *options, "-cubin", "-o", str(cubin), str(source)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"check_kernels: {source} does not compile:\n{done.stderr}")
    return done.stderr


def find_disassembler(nvcc: Path) -> Path:
    """nvdisasm from PATH, from the CUDA toolkit, or from its PyPI package."""
    packages = [Path(folder) / "nvidia" / "cu13" / "bin" for folder in sys.path]
    for folder in [*map(Path, os.environ.get("PATH", "").split(os.pathsep)), nvcc.resolve().parent, *packages]:
        if found := shutil.which("nvdisasm", path=str(folder)):
            return Path(found)
    raise SystemExit("check_kernels: no nvdisasm: install a CUDA toolkit with it, or: pip install nvidia-cuda-nvdisasm")


def shared_bytes(nvcc: Path, includes: Iterable[Path], folder: Path) -> int:
    """What the decode kernel asks for at launch: the compiler reports the size of a global of that size."""
    source = folder / "shared_bytes.cu"
    source.write_text(f'#include "sm90/decode.cuh"\n__device__ char bytes[sizeof(flashmla::DecodeShared) + {SLACK}];\n')
    log = compile_cubin(nvcc, includes, source, source.with_suffix(".cubin"))
    return int(re.search(r"(\d+) bytes gmem", log)[1])  # type: ignore[index]


def check(sources: Iterable[Path], nvcc: Path, includes: Iterable[Path]) -> tuple[list[Kernel], list[str]]:
    """Compile, read the logs and the SASS: every kernel, and every fault."""
    disassembler = find_disassembler(nvcc)

    def check_one(index: int, source: Path) -> tuple[list[Kernel], list[str]]:
        cubin = Path(folder) / f"{index}.cubin"
        kernels, faults = read_log(compile_cubin(nvcc, includes, source, cubin))
        if kernels:
            done = subprocess.run([disassembler, "-c", cubin], capture_output=True, text=True, check=True)
            read_sass(done.stdout, kernels)
        return list(kernels.values()), [*faults, *(fault for kernel in kernels.values() for fault in kernel.faults())]

    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(2) as pool:
        results = list(pool.map(check_one, *zip(*enumerate(sources), strict=True)))
    return [k for kernels, _ in results for k in kernels], [f for _, faults in results for f in faults]


def table(kernels: Iterable[Kernel]) -> str:
    rows = [["kernel", "", "registers", "spills", "static smem", *SHOWN]]
    for k in kernels:
        counts = [k.registers, k.spills, k.static_shared, *(k.opcodes[opcode] for opcode in SHOWN)]
        rows.append([k.name, k.element, *map(str, counts)])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows)


def main(arguments: list[str]) -> int:
    """Check all kernels and print one table; 0 if nothing is wrong."""
    parser = argparse.ArgumentParser(description="Check the compiled kernels, without a GPU.")
    parser.add_argument(
        "--cutlass", type=Path, help="folder that holds cutlass/version.h; by default from PyPI's package"
    )
    cutlass = parser.parse_args(arguments).cutlass or toolkit.cutlass_include()
    nvcc = toolkit.system_nvcc(os.environ) or toolkit.pypi_nvcc()
    if nvcc is None:
        raise SystemExit("check_kernels: no nvcc: install a CUDA toolkit and point CUDACXX at its nvcc")
    if cutlass is None:
        raise SystemExit(f"check_kernels: no CUTLASS headers: pip install --no-deps '{toolkit.PYPI_CUTLASS}'")
    includes = [KERNELS / "include", KERNELS, cutlass]
    kernels, faults = check(sorted(KERNELS.rglob("*.cu")), nvcc.path, includes)
    faults += [f"{name}: there is no kernel of this name" for name in RULES if name not in {k.name for k in kernels}]
    with tempfile.TemporaryDirectory() as folder:
        shared = shared_bytes(nvcc.path, includes, Path(folder))
    if shared > MAX_SHARED_BYTES:
        faults.append(f"decode_kernel: {shared} bytes of shared memory, an SM gives {MAX_SHARED_BYTES}")

    print(table(kernels))
    print(f"decode_kernel asks for {shared} bytes of shared memory, of {MAX_SHARED_BYTES}")
    for fault in faults:
        print(f"FAULT {fault}")
    return bool(faults)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
