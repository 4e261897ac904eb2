"""PEP 517 build backend: scikit-build-core, plus the choice of CUDA compiler and CUTLASS headers (toolkit.py)."""

from __future__ import annotations

import os
import platform
from typing import Any

import pybind11
import toolkit
from scikit_build_core import build as skbuild
from scikit_build_core.build import (
    build_sdist,
    get_requires_for_build_sdist,
    prepare_metadata_for_build_editable,
    prepare_metadata_for_build_wheel,
)

__all__ = [
    "build_editable",
    "build_sdist",
    "build_wheel",
    "get_requires_for_build_editable",
    "get_requires_for_build_sdist",
    "get_requires_for_build_wheel",
    "prepare_metadata_for_build_editable",
    "prepare_metadata_for_build_wheel",
]

Settings = dict[str, Any] | None


def get_requires_for_build_wheel(config_settings: Settings = None) -> list[str]:
    """scikit-build-core's requirements (cmake, ninja) and ours (CUTLASS, nvcc)."""
    return skbuild.get_requires_for_build_wheel(config_settings) + _toolkit_requirements()


def get_requires_for_build_editable(config_settings: Settings = None) -> list[str]:
    """As for a wheel."""
    return skbuild.get_requires_for_build_editable(config_settings) + _toolkit_requirements()


def build_wheel(wheel_directory: str, config_settings: Settings = None, metadata_directory: str | None = None) -> str:
    """Build a wheel with the chosen toolkit."""
    return skbuild.build_wheel(wheel_directory, _with_toolkit(config_settings), metadata_directory)


def build_editable(
    wheel_directory: str, config_settings: Settings = None, metadata_directory: str | None = None
) -> str:
    """Build an editable wheel with the chosen toolkit."""
    return skbuild.build_editable(wheel_directory, _with_toolkit(config_settings), metadata_directory)


def _toolkit_requirements() -> list[str]:
    machine = f"{platform.system()} {platform.machine()}"
    return toolkit.requirements(toolkit.system_nvcc(os.environ), machine)


def _with_toolkit(config_settings: Settings) -> dict[str, Any]:
    nvcc, cutlass_include = toolkit.select(os.environ)
    print(f"flashmla_backend: building with {nvcc.path}, CUTLASS headers in {cutlass_include}", flush=True)
    if nvcc.lib is not None:
        # The PyPI packages keep their libraries in lib, nvcc tells the linker of lib64.
        old = os.environ.get("LIBRARY_PATH")
        os.environ["LIBRARY_PATH"] = f"{nvcc.lib}:{old}" if old else str(nvcc.lib)
    return {
        **(config_settings or {}),
        "cmake.define.CMAKE_CUDA_COMPILER": str(nvcc.path),
        "cmake.define.FLASHMLA_CUTLASS_INCLUDE": str(cutlass_include),
        # Or CMake takes another pybind11 that lies in the virtual environment pip runs in.
        "cmake.define.pybind11_DIR": pybind11.get_cmake_dir(),
    }
