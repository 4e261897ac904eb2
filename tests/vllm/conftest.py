"""The real engine in processes of its own."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from flashmla_backend.checkpoint import Architecture, make_checkpoint
from tests.engine_process import answered
from tests.greedy import Reference, generate


@dataclass(frozen=True)
class EngineRun:
    """What engine_run.py answered, and what the engine logged."""

    tokens: list[list[list[int]]]
    cached: list[list[int]]
    counters: dict[str, float]
    config: dict[str, Any]
    backend: str
    decodes: dict[tuple[int, int], int]  # (requests, new tokens of each, 0 if they differ) -> calls of the backend
    decoding_layers: int  # that made these calls
    log: str


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        for item in items:
            if Path(__file__).parent in item.path.parents:
                item.add_marker(pytest.mark.skip(reason="needs a CPU build of vLLM"))


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Architecture], Path]:
    folder = tmp_path_factory.mktemp("checkpoints")
    return cache(lambda architecture: make_checkpoint(folder / architecture, architecture, dtype="float32"))


@pytest.fixture(scope="session")
def reference(
    checkpoint: Callable[[Architecture], Path],
) -> Callable[[Architecture], tuple[Reference, Reference]]:
    """For an architecture: independent prompts, the last of them the prefix; then prompts that begin with it."""
    return cache(lambda architecture: generate(checkpoint(architecture)))


@pytest.fixture
def run_engine(tmp_path: Path) -> Callable[..., EngineRun]:
    """Starts vLLM once: run_engine(batches, many_processes=..., environment=..., **arguments of vllm.LLM)."""

    def run(
        batches: list[list[list[int]]],
        *,
        many_processes: bool = False,
        environment: dict[str, str] | None = None,
        **engine: Any,
    ) -> EngineRun:
        script = Path(__file__).with_name("engine_run.py")
        environment = {
            "VLLM_ENABLE_V1_MULTIPROCESSING": str(int(many_processes)),
            "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",  # functions sent to the worker, see engine_run.py
            "VLLM_CACHE_ROOT": str(tmp_path),  # compile afresh
            **(environment or {}),
        }
        answer, log = answered(script, batches, engine, environment, tmp_path)
        decodes = {}
        for key, calls in answer.pop("decodes").items():
            requests, new_tokens = key.split(",")
            decodes[int(requests), int(new_tokens)] = calls
        return EngineRun(**answer, decodes=decodes, log=log)

    return run


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.LogCaptureFixture]:
    """Our lines in vLLM's log. caplog listens at the root logger, which vLLM may or may not propagate to."""
    logger = logging.getLogger("vllm.flashmla_backend")
    monkeypatch.setattr(logger, "propagate", False)
    caplog.set_level(logging.INFO, logger.name)
    logger.addHandler(caplog.handler)
    yield caplog
    logger.removeHandler(caplog.handler)


@pytest.fixture
def unchanged_environment() -> Iterator[None]:
    """vLLM's CPU platform writes LD_PRELOAD and others into os.environ."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)
