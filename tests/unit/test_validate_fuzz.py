"""The C ABI's validation under AddressSanitizer and UBSan, with random arguments: kernels/tools/validate_fuzz.cpp."""

from __future__ import annotations

import shutil
import subprocess
from functools import cache
from pathlib import Path

import pytest

KERNELS = Path(__file__).parents[2] / "kernels"
HOST = (KERNELS / "host" / "validate.cpp", KERNELS / "host" / "error.cpp")
FLAGS = ["-std=c++17", "-g", "-O1", "-Wall", "-Wextra", "-Werror"]
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]


@cache
def why_no_sanitizers() -> str | None:
    if shutil.which("g++") is None:
        return "no g++"
    trial = ["g++", "-x", "c++", *SANITIZERS, "-o", "/dev/null", "-"]
    done = subprocess.run(trial, input="int main() {}", capture_output=True, text=True)
    return None if done.returncode == 0 else f"g++ has no sanitizers here: {done.stderr[-200:]}"


def fuzz(folder: Path, sources: tuple[Path, ...], cases: int, seed: int) -> subprocess.CompletedProcess[str]:
    if reason := why_no_sanitizers():
        pytest.skip(reason)
    program = folder / "validate_fuzz"
    includes = [f"-I{KERNELS}", f"-I{KERNELS / 'include'}"]
    files = [str(KERNELS / "tools" / "validate_fuzz.cpp"), *map(str, sources)]
    subprocess.run(["g++", *FLAGS, *SANITIZERS, *includes, *files, "-o", str(program)], check=True)
    return subprocess.run([program, str(cases), str(seed)], capture_output=True, text=True, timeout=120)


def test_validation_is_what_the_headers_document(tmp_path: Path) -> None:
    done = fuzz(tmp_path, HOST, cases=400_000, seed=1)
    assert done.returncode == 0, done.stdout + done.stderr
    words = done.stdout.split()  # OK N cases each: D decodes, R ragged, S schedules, B bounds accepted
    assert words[0] == "OK" and min(map(int, words[4:11:2])) > 100_000  # it is not all refused either


@pytest.mark.parametrize(
    "right, wrong, complaint",
    [
        ("kMaxGrid = 65535", "kMaxGrid = 65536", "accepted outside the documented limits"),
        ("stride % 8 == 0", "stride % 16 == 0", "refused within the documented limits"),
        ("p.max_leaves != 0", "p.max_leaves > 1", "accepted outside the documented limits"),
        ("query_offsets, 4)", "query_offsets, 1)", "accepted outside the documented limits"),
        ("p.s_q > INT_MAX / p.h_q / p.batch", "p.s_q * p.h_q * p.batch < 0", "signed integer overflow"),
    ],
)
def test_faults_are_found(right: str, wrong: str, complaint: str, tmp_path: Path) -> None:
    source = HOST[0].read_text()
    assert right in source
    broken = tmp_path / "validate.cpp"
    broken.write_text(source.replace(right, wrong))
    done = fuzz(tmp_path, (broken, HOST[1]), cases=100_000, seed=1)
    assert done.returncode != 0 and complaint in done.stdout + done.stderr
