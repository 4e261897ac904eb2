"""The compiled module `flashmla_backend._native`: loads it on first use, says in words why it cannot."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import Any

from .errors import InvalidArgument, Unsupported


@dataclass(frozen=True)
class BuildInfo:
    """How the compiled module was built."""

    version: str
    """Of this package when it was compiled, "0.1.0"."""
    cuda_version: str
    """Of the CUDA toolkit, "13.0"."""
    arch: str
    """The one GPU architecture compiled for, "sm_90a"."""
    cutlass_version: str
    compiler: str
    """Device and host compiler, "nvcc 13.0.88, GNU 12.2.0"."""


@dataclass(frozen=True)
class DeviceInfo:
    """A CUDA device, as the driver describes it."""

    index: int
    """Among the visible devices (CUDA_VISIBLE_DEVICES applies)."""
    name: str
    compute_capability: tuple[int, int]
    """(9, 0) is Hopper."""
    sm_count: int
    memory_bytes: int
    l2_bytes: int
    driver_version: str
    """The newest CUDA version that the installed driver serves, "13.0"."""


@cache
def unavailable_reason() -> str | None:
    """Why the compiled module is not importable, in a sentence; None if it is."""
    name = f"{__package__}._native"
    try:
        importlib.import_module(name)
    except ModuleNotFoundError:
        return f"{name} is not there: this is a source tree that was not built; run `pip install .` in it"
    except ImportError as error:
        return f"{name} is there but does not load ({error}); rebuild it on this machine with `pip install .`"
    return None


def available() -> bool:
    """Whether the compiled module is importable. Says nothing about GPUs."""
    return unavailable_reason() is None


def build_info() -> BuildInfo:
    """How the compiled module was built.

    Raises:
        Unsupported: the compiled module is not available.
    """
    return BuildInfo(**load().build_info())


def devices() -> list[DeviceInfo]:
    """The visible CUDA devices; [] where there is no GPU or no driver.

    Initialises the CUDA driver in this process: CUDA does not work in a child forked after it.

    Raises:
        Unsupported: the compiled module is not available, or the driver is too old for it or reports an error.
    """
    module = load()
    try:
        return [_device_info(index, **module.device(index)) for index in range(module.device_count())]
    except RuntimeError as error:
        raise Unsupported(str(error)) from None


def probe_failure(index: int) -> str | None:
    """Run a small kernel of this build on the visible device `index` and check what it wrote.

    Returns:
        None if it ran and wrote what it should, else why not, in a sentence.

    Raises:
        InvalidArgument: there is no such device.
        Unsupported: the compiled module is not available.
    """
    module = load()
    try:
        module.probe(index)
    except ValueError as error:
        raise InvalidArgument(str(error)) from None
    except RuntimeError as error:
        return str(error)
    return None


@cache
def load() -> ModuleType:
    """The compiled module.

    Raises:
        Unsupported: it is not available.
    """
    if reason := unavailable_reason():
        raise Unsupported(reason)
    return importlib.import_module(f"{__package__}._native")


def _device_info(index: int, driver_cuda_version: int, **properties: Any) -> DeviceInfo:
    driver_version = f"{driver_cuda_version // 1000}.{driver_cuda_version % 1000 // 10}"
    return DeviceInfo(index=index, driver_version=driver_version, **properties)
