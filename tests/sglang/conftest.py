"""SGLang without a GPU, and its real engine in processes of its own."""

from __future__ import annotations

import importlib.util
import logging
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from flashmla_backend.checkpoint import Architecture, make_checkpoint
from flashmla_backend.integration.sglang import LOGGER_NAME, cpu
from tests.engine_process import answered
from tests.greedy import NEW_TOKENS, Reference, generate

if importlib.util.find_spec("sglang") is None:
    collect_ignore_glob = ["test_*.py"]
else:
    cpu.prepare()


@dataclass(frozen=True)
class EngineRun:
    """What engine_run.py answered, and what the engine logged."""

    tokens: list[list[list[int]]]
    cached: list[list[int]]
    log: str


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Architecture], Path]:
    folder = tmp_path_factory.mktemp("checkpoints")
    return cache(lambda architecture: make_checkpoint(folder / architecture, architecture, dtype="float32"))


@pytest.fixture(scope="session")
def reference(checkpoint: Callable[[Architecture], Path]) -> Callable[[Architecture], tuple[Reference, Reference]]:
    """For an architecture: independent prompts, the last of them the prefix; then prompts that begin with it."""
    return cache(lambda architecture: generate(checkpoint(architecture)))


@pytest.fixture
def run_engine(tmp_path: Path) -> Callable[..., EngineRun]:
    """Starts SGLang once: run_engine(batches, environment=..., new_tokens=..., **arguments of sglang.Engine)."""

    def run(
        batches: list[list[list[int]]],
        *,
        environment: dict[str, str] | None = None,
        new_tokens: int = NEW_TOKENS,
        **engine: Any,
    ) -> EngineRun:
        script = "engine_run.py"
        environment = {"TORCH_COMPILE_DISABLE": "1", **(environment or {})}
        if engine.get("dcp_size", 1) > 1:
            script = "dcp_engine_run.py"
            # SGLang's default is a NUMA node for each rank.
            cores = sorted(os.sched_getaffinity(0))[: engine["tp_size"]]
            binding = "|".join(map(str, cores + cores[:1] * (engine["tp_size"] - len(cores))))
            environment |= {
                "TRITON_INTERPRET": "1",
                "SGLANG_CPU_OMP_THREADS_BIND": binding,
                "GLOO_SOCKET_IFNAME": "lo",
            }
        answer, log = answered(Path(__file__).with_name(script), batches, engine, environment, tmp_path, new_tokens)
        return EngineRun(**answer, log=log)

    return run


@pytest.fixture
def registered() -> Iterator[None]:
    """flashmla is ours for the length of a test."""
    from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS

    from flashmla_backend.integration.sglang import compat, register

    before = dict(ATTENTION_BACKENDS)
    register()
    yield
    compat.take_queries_whole()
    ATTENTION_BACKENDS.clear()
    ATTENTION_BACKENDS.update(before)


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    """Our lines in SGLang's log."""
    caplog.set_level(logging.INFO, LOGGER_NAME)
    return caplog
