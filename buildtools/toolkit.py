"""Where a build takes its CUDA compiler and its CUTLASS headers from.

A system nvcc of at least `MIN_NVCC` is preferred, looked for in $CUDACXX, $CUDA_HOME, $PATH and
/usr/local/cuda; without one the compiler comes from PyPI packages as a build requirement. The CUTLASS
headers always come from PyPI. FLASHMLA_BUILD_NVCC=pypi ignores the system's nvcc.
"""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

Version = tuple[int, int]

# CUTLASS 4 asks for 12.8 to perform best on Hopper.
MIN_NVCC: Version = (12, 8)

# One minor release for all: nvcc's own requirements have no bounds, and a newer nvvm emits PTX that an older
# ptxas refuses. 13.0 because PyTorch's default CUDA wheels are built on it: a driver that runs them runs us.
PYPI_NVCC = tuple(f"nvidia-{part}==13.0.*" for part in ("cuda-nvcc", "nvvm", "cuda-crt", "cuda-runtime", "cuda-cccl"))

# The newest release on PyPI, and the only one of CUTLASS 4. Pinned: CUTLASS changes its APIs in minor releases.
PYPI_CUTLASS = "nvidia-cutlass==4.2.0.0"


class BuildError(SystemExit):
    """Ends the build with one sentence instead of a traceback."""

    def __init__(self, sentence: str) -> None:
        super().__init__(f"flashmla_backend: {sentence}")


@dataclass(frozen=True)
class Nvcc:
    """A CUDA compiler: its path, its version, and the library folder that its linker must be told of."""

    path: Path
    version: Version
    lib: Path | None = None


def nvcc_version(nvcc: Path) -> Version | None:
    """The release `nvcc --version` reports, or None if it does not run."""
    try:
        text = subprocess.run([nvcc, "--version"], capture_output=True, text=True, timeout=60).stdout
    except (OSError, subprocess.TimeoutExpired):
        return None
    release = re.search(r"release (\d+)\.(\d+)", text)
    return (int(release[1]), int(release[2])) if release else None


def system_candidates(env: Mapping[str, str], default_root: Path = Path("/usr/local/cuda")) -> list[Path]:
    """Paths at which an nvcc of the system may lie, best first; $CUDACXX and $CUDA_HOME may name one that does not."""
    candidates = []
    if cudacxx := env.get("CUDACXX"):
        candidates.append(Path(shutil.which(cudacxx, path=env.get("PATH", "")) or cudacxx))
    if cuda_home := env.get("CUDA_HOME"):
        candidates.append(Path(cuda_home) / "bin" / "nvcc")
    if on_path := shutil.which("nvcc", path=env.get("PATH", "")):
        candidates.append(Path(on_path))
    if (default := default_root / "bin" / "nvcc").exists():
        candidates.append(default)
    return list(dict.fromkeys(candidates))


def system_nvcc(
    env: Mapping[str, str],
    default_root: Path = Path("/usr/local/cuda"),
    version_of: Callable[[Path], Version | None] = nvcc_version,
) -> Nvcc | None:
    """The first system nvcc that is new enough, or None. Says on stderr which ones it passed over."""
    choice = env.get("FLASHMLA_BUILD_NVCC", "")
    if choice == "pypi":
        return None
    if choice:
        raise BuildError(f"FLASHMLA_BUILD_NVCC is {choice!r}; it may be 'pypi' or unset.")
    for path in system_candidates(env, default_root):
        version = version_of(path)
        if version is not None and version >= MIN_NVCC:
            return Nvcc(path, version)
        fault = "does not run" if version is None else f"is release {_dotted(version)}"
        print(f"flashmla_backend: passing over {path}: it {fault}, >= {_dotted(MIN_NVCC)} is needed", file=sys.stderr)
    return None


def pypi_nvcc(version_of: Callable[[Path], Version | None] = nvcc_version) -> Nvcc | None:
    """The nvcc that the packages of `PYPI_NVCC` put into this Python environment, or None."""
    for root in _package_folders("nvidia.cu13"):
        version = version_of(root / "bin" / "nvcc")
        if version is not None and version >= MIN_NVCC:
            return Nvcc(root / "bin" / "nvcc", version, lib=root / "lib")
    return None


def cutlass_include() -> Path | None:
    """The folder with the CUTLASS headers that `PYPI_CUTLASS` put into this Python environment, or None."""
    for root in _package_folders("cutlass_library"):
        include = root / "source" / "include"
        if (include / "cutlass" / "version.h").exists():
            return include
    return None


def requirements(nvcc: Nvcc | None, machine: str) -> list[str]:
    """What the build environment must install, given the system's nvcc and the machine ("Linux x86_64")."""
    if nvcc is not None:
        return [PYPI_CUTLASS]
    if machine not in ("Linux x86_64", "Linux aarch64"):
        raise BuildError(
            f"no nvcc >= {_dotted(MIN_NVCC)} was found, and PyPI has no CUDA compiler for {machine}: "
            "install a CUDA toolkit and point CUDACXX at its nvcc."
        )
    return [PYPI_CUTLASS, *PYPI_NVCC]


def select(env: Mapping[str, str]) -> tuple[Nvcc, Path]:
    """The compiler and the CUTLASS include folder for the build at hand, in an environment that is set up."""
    nvcc = system_nvcc(env) or pypi_nvcc()
    if nvcc is None:
        raise BuildError(
            f"no CUDA compiler: install a CUDA toolkit >= {_dotted(MIN_NVCC)} and point CUDACXX at its nvcc, "
            f"or run: pip install {_quoted(PYPI_NVCC)}"
        )
    include = cutlass_include()
    if include is None:
        raise BuildError(f"no CUTLASS headers: run: pip install --no-deps {_quoted([PYPI_CUTLASS])}")
    return nvcc, include


def _package_folders(name: str) -> list[Path]:
    try:
        spec = importlib.util.find_spec(name)
    except ModuleNotFoundError:  # the parent package is missing
        return []
    return [Path(folder) for folder in spec.submodule_search_locations or []] if spec else []


def _dotted(version: Version) -> str:
    return f"{version[0]}.{version[1]}"


def _quoted(packages: Sequence[str]) -> str:
    return " ".join(f"'{package}'" for package in packages)
