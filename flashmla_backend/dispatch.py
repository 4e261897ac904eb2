"""Which implementation serves a device: torch on the CPU, our kernels on Hopper, FlashInfer's on other NVIDIA GPUs."""

from __future__ import annotations

import importlib.util
from functools import cache
from typing import Literal

import torch

from flashmla_backend import native, sm90
from flashmla_backend.errors import Unsupported

Path = Literal["cpu", "sm90", "flashinfer"]

DTYPES: dict[Path, tuple[torch.dtype, ...]] = {
    "cpu": (torch.bfloat16, torch.float16, torch.float32),
    "sm90": tuple(sm90.DTYPES),
    "flashinfer": (torch.bfloat16, torch.float16),
}

NAMES: dict[Path, str] = {"cpu": "CPU reference path", "sm90": "sm_90a kernels", "flashinfer": "FlashInfer's kernels"}

_chosen: dict[torch.device, Path] = {}  # a device does not change; its absence of an implementation may


def path_of(device: torch.device) -> Path:
    """The implementation for tensors on `device`.

    Raises:
        Unsupported: there is none, and what would help.
    """
    path = _chosen.get(device)
    if path is None:
        path = _chosen[device] = _choose(device)
    return path


def _choose(device: torch.device) -> Path:
    if device.type == "cpu":
        return "cpu"
    if device.type != "cuda":
        raise Unsupported(
            f"there are no decode kernels for {device}: keep the tensors on the CPU or on an NVIDIA GPU, or leave the "
            "engine's built-in backend in place"
        )
    capability = torch.cuda.get_device_capability(device)
    missing = why_no_kernels(capability)
    if missing is None:
        return "sm90"
    if importlib.util.find_spec("flashinfer") is not None:
        return "flashinfer"
    raise Unsupported(
        f"{device} ({torch.cuda.get_device_name(device)}, compute capability {capability[0]}.{capability[1]}) has no "
        f"decode kernels: {missing}, and FlashInfer, whose kernels serve other GPUs, is not installed; run `pip "
        "install flashinfer-python`, or leave the engine's built-in backend in place"
    )


def why_no_kernels(capability: tuple[int, int]) -> str | None:
    """Why our kernels do not run on a GPU of this compute capability; None if they do."""
    if capability != (9, 0):
        return "ours run on 9.0 (Hopper) only"
    return native.unavailable_reason()


def default_num_sms(device: torch.device) -> int:
    """Thread blocks that run at once: the GPU's SMs, on the CPU torch's threads."""
    return sm_count(device) if device.type == "cuda" else torch.get_num_threads()


@cache
def sm_count(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count
