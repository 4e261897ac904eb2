"""The tests of this folder run the Hopper kernels.

python -m pytest tests/kernels --record FILE also writes what was run and what failed as JSON.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from flashmla_backend.dispatch import why_no_kernels
from tests.kernels.record import Recorder


@pytest.fixture(autouse=True)
def hopper() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    if reason := why_no_kernels(torch.cuda.get_device_capability()):
        pytest.skip(f"{torch.cuda.get_device_name()}: {reason}")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--record", type=Path, metavar="FILE", help="write what was run and what failed as JSON")
    parser.addoption("--commit", help="for the record, where git cannot tell")


def pytest_configure(config: pytest.Config) -> None:
    if path := config.getoption("record", None):  # the option is there if this folder was named in the call
        command = ["pytest", *map(str, config.invocation_params.args)]
        config.pluginmanager.register(Recorder(path, command, config.getoption("commit")))
