"""What the compiler makes of the kernels, and that the gate which looks at it can fail. No GPU."""

from __future__ import annotations

import os
import re
from pathlib import Path

import check_kernels
import pytest
import toolkit

NVCC = toolkit.system_nvcc(os.environ) or toolkit.pypi_nvcc()
needs_nvcc = pytest.mark.skipif(NVCC is None, reason="no nvcc here: nothing to compile the kernels with")


@needs_nvcc
def test_the_kernels_are_compiled_as_designed(capsys: pytest.CaptureFixture[str]) -> None:
    exit_code = check_kernels.main([])
    printed = capsys.readouterr().out
    assert exit_code == 0, printed
    assert re.search(r"^decode_kernel +bf16 ", printed, re.MULTILINE)


def faults_of(source: str, folder: Path) -> str:
    assert NVCC is not None
    path = folder / "kernel.cu"
    path.write_text(source)
    return "\n".join(check_kernels.check([path], NVCC.path, [])[1])


@needs_nvcc
def test_a_kernel_that_spills_is_faulted(tmp_path: Path) -> None:
    faults = faults_of(
        """
        __global__ void __launch_bounds__(1024) greedy(float* x) {
          float v[128];
          for (int i = 0; i < 128; ++i) v[i] = x[i * 1024 + threadIdx.x];
          __syncthreads();
          for (int i = 0; i < 128; ++i) x[i * 1024 + threadIdx.x] = v[i] * v[127 - i];
        }
        """,
        tmp_path,
    )
    assert re.search(r"greedy: \d+ bytes of register spills", faults)


@needs_nvcc
def test_a_decode_kernel_without_its_instructions_is_faulted(tmp_path: Path) -> None:
    source = "__global__ void decode_kernel(float* x) { volatile float v[9]; v[int(x[0])] = 1; x[1] = v[int(x[2])]; }"
    faults = faults_of(source, tmp_path)
    for opcode in ("HGMMA", "UTMALDG", "USETMAXREG"):
        assert f"decode_kernel: no {opcode} in its SASS" in faults
    assert re.search(r"decode_kernel: \d+ x LDL in its SASS", faults)


@needs_nvcc
def test_a_decode_kernel_that_starts_the_next_one_too_early_is_faulted(tmp_path: Path) -> None:
    launch, wait = (
        'asm volatile("griddepcontrol.launch_dependents;");',
        'asm volatile("griddepcontrol.wait;":::"memory");',
    )
    source = "__global__ void decode_kernel(float* x) {{ {} x[0] = 1; }}"
    too_early = "decode_kernel: lets the next kernel start before it has waited itself"
    assert too_early in faults_of(source.format(launch + wait), tmp_path)
    assert too_early in faults_of(source.format(wait), tmp_path)
    faults = faults_of(source.format(wait + launch), tmp_path)
    assert too_early not in faults and "waits for the kernel before in 1 places, not in 9" in faults


@needs_nvcc
def test_a_decode_kernel_that_reads_too_early_is_faulted(tmp_path: Path) -> None:
    """The compiler may do a load of what it takes for constant where the source has it after the wait."""
    wait = 'asm volatile("griddepcontrol.wait;":::"memory");'
    source = "__global__ void decode_kernel(float* x, const float* y) {{ {} }}"
    too_early = "decode_kernel: reads global memory before it has waited"
    assert too_early in faults_of(source.format(f"float z = *(volatile float*)y; {wait} x[0] = z;"), tmp_path)
    assert too_early not in faults_of(source.format(f"{wait} x[0] = y[0];"), tmp_path)


@pytest.mark.parametrize(
    "end, early",
    [("", 0), ("@P0 EXIT ;", 0), ("EXIT ;", 1)],  # behind an end for all lies another role
)
def test_a_wait_counts_up_to_the_end_of_its_role(end: str, early: int) -> None:
    symbol = "_ZN8flashmla13decode_kernelI6__halfLb0ELb0EEEv"
    kernels, _ = check_kernels.read_log(f"Compiling entry function '{symbol}'\nptxas info    : Used 168 registers")
    code = ["ACQBULK ;", *([end] if end else []), "LDG.E R2, desc[UR4][R2.64] ;"]
    lines = [f".text.{symbol}:", *(f"        /*{i:04x}*/   {x}" for i, x in enumerate(code))]
    check_kernels.read_sass("\n".join(lines), kernels)
    assert kernels[symbol].early_reads == early


@pytest.mark.parametrize(
    "steps, symbol, faulted",
    [
        ("EHEHEHEH", "_ZN8flashmla13decode_kernelI6__halfLb0ELb0EEEv", False),
        ("EHEEEHHH", "_ZN8flashmla13decode_kernelI6__halfLb0ELb0EEEv", True),
        ("EHEEEHHH", "_ZN8flashmla13decode_kernelI6__halfLb1ELb0EEEv", False),  # batch-invariant
    ],
)
def test_steps_that_wait_for_exponentials_of_later_ones_are_faulted(steps: str, symbol: str, faulted: bool) -> None:
    code = {"E": "MUFU.EX2 R1, R1 ;", "H": "HGMMA.64x256x16.F32.BF16 R24, R152, gdesc[UR16].tnspB, R24, gsb0 ;"}
    right = "HHHH"  # the other side's, whose probabilities are there
    log = f"Compiling entry function '{symbol}' for 'sm_90a'\nptxas info    : Used 168 registers"
    kernels, _ = check_kernels.read_log(log)
    lines = [f".text.{symbol}:", *(f"        /*{i:04x}*/   {code[x]}" for i, x in enumerate(steps + right))]
    check_kernels.read_sass("\n".join(lines), kernels)
    found = [fault for fault in kernels[symbol].faults() if "exponentials of several steps" in fault]
    assert bool(found) == faulted


@pytest.mark.parametrize("code", check_kernels.BAD_CODES)
def test_complaints_of_ptxas_are_faults(code: str) -> None:
    _, faults = check_kernels.read_log(
        "ptxas info    : 0 bytes gmem\n"
        f"ptxas info    : ({code}) Potential Performance Loss: something in function 'decode_kernel'\n"
        "ptxas info    : (C7999) something else\n"
    )
    (fault,) = faults
    assert fault.startswith(f"ptxas {code}, {check_kernels.BAD_CODES[code]}")


@pytest.mark.parametrize(
    "symbol, expected",
    [
        ("_ZN8flashmla13decode_kernelI6__halfEEvNS_15DecodeArgumentsE", ("decode_kernel", "fp16")),
        ("_ZN8flashmla5naive19naive_decode_kernelI14__nv_bfloat162EEv4args", ("naive_decode_kernel", "bf16")),
        ("_ZN43_GLOBAL__N__0123456789abcdef0123456789abcde12probe_kernelEPj", ("probe_kernel", "")),
        ("_Z6greedyPf", ("greedy", "")),
        ("plain", ("plain", "")),
    ],
)
def test_symbols_are_told_by_name_and_element(symbol: str, expected: tuple[str, str]) -> None:
    assert check_kernels.demangle(symbol) == expected


def test_a_missing_disassembler_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("sys.path", [])
    with pytest.raises(SystemExit, match=r"no nvdisasm: .* pip install nvidia-cuda-nvdisasm"):
        check_kernels.find_disassembler(tmp_path / "nvcc")


def test_the_development_extra_brings_the_headers_that_a_build_uses() -> None:
    pyproject = Path(check_kernels.__file__).parent.parent / "pyproject.toml"
    assert f'"{toolkit.PYPI_CUTLASS}"' in pyproject.read_text()
