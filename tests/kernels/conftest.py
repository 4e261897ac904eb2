"""The tests of this folder run the Hopper kernels."""

from __future__ import annotations

import pytest
import torch

from flashmla_backend.dispatch import why_no_kernels


@pytest.fixture(autouse=True)
def hopper() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    if reason := why_no_kernels(torch.cuda.get_device_capability()):
        pytest.skip(f"{torch.cuda.get_device_name()}: {reason}")
