"""What SGLang imports on machines without a GPU, and PyPI has in builds for GPUs only.

SGLang reads images and asks vLLM for a rotary kernel in modules that every model loads, ours included; nothing of
either is called there. Where the import itself would fail, an empty stand-in is enough.
"""

from __future__ import annotations

import importlib.util
import sys
from importlib.machinery import ModuleSpec
from typing import Any, NoReturn

import torch


def prepare() -> None:
    """Call before SGLang is imported, in each of its processes. Does nothing for a torch that has CUDA."""
    if torch.version.cuda is None:
        _declare_torchvision_operators()
        _stand_in_for_vllm()


def _declare_torchvision_operators() -> None:
    """torchvision describes two operators of its compiled part, which does not load beside a CPU torch."""
    for name in ("nms", "qnms"):
        if not hasattr(torch.ops.torchvision, name):
            torch.library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


def _stand_in_for_vllm() -> None:
    if "vllm" in sys.modules or importlib.util.find_spec("vllm") is not None:
        return

    def rotary_embedding(*_: Any) -> NoReturn:
        raise NotImplementedError("vLLM's rotary kernel was called, which is not installed; pass --device cuda")

    for name in ("vllm", "vllm._custom_ops"):
        sys.modules[name] = importlib.util.module_from_spec(ModuleSpec(name, None))
    sys.modules["vllm._custom_ops"].rotary_embedding = rotary_embedding  # type: ignore[attr-defined]
