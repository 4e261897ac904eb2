"""Who serves flashmla: us, in every process; or whoever was there before us, with the reason in the log."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any

import pytest
import torch
from sglang.srt.layers.attention import attention_registry
from sglang.srt.models.deepseek_common.attention_backend_handler import AttentionBackendRegistry
from sglang.srt.models.deepseek_common.utils import FORWARD_ABSORB_CORE_ATTENTION_BACKENDS

from flashmla_backend.errors import Unsupported
from flashmla_backend.integration.sglang import compat, plugin, register

BACKENDS = attention_registry.ATTENTION_BACKENDS
BUILTIN = attention_registry.create_flashmla_backend
WHO_SERVES = """
from flashmla_backend.integration.sglang import cpu
cpu.prepare()
from sglang.srt.plugins import load_plugins
load_plugins()
load_plugins()
from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS
print("served by", ATTENTION_BACKENDS["flashmla"].__module__)
"""


@pytest.fixture(autouse=True)
def unclaimed() -> Iterator[None]:
    draft_module, handlers = sys.modules.pop(compat.DRAFT_MODULE, None), dict(AttentionBackendRegistry._handlers)
    before, BACKENDS["flashmla"] = BACKENDS["flashmla"], BUILTIN
    yield
    BACKENDS["flashmla"], AttentionBackendRegistry._handlers = before, handlers
    compat.take_queries_whole()
    sys.modules.pop(compat.DRAFT_MODULE, None)
    if draft_module is not None:
        sys.modules[compat.DRAFT_MODULE] = draft_module


def test_the_entry_point_is_installed() -> None:
    (point,) = entry_points(group="sglang.srt.plugins", name="flashmla_backend")
    assert point.load() is register


def who_serves(**environment: str) -> tuple[str, str]:
    """The module that serves flashmla in a fresh process, and what the process wrote to stderr."""
    asked = subprocess.run(
        [sys.executable, "-c", WHO_SERVES], env={**os.environ, **environment}, capture_output=True, text=True
    )
    assert asked.returncode == 0, asked.stderr
    return asked.stdout.split()[-1], asked.stderr


def test_sglang_loads_us_by_itself() -> None:
    served_by, _ = who_serves()
    assert served_by == "flashmla_backend.integration.sglang.backend"


def test_disabled_by_the_environment(monkeypatch: pytest.MonkeyPatch, log: pytest.LogCaptureFixture) -> None:
    served_by, _ = who_serves(FLASHMLA_BACKEND_DISABLE="1")
    assert served_by == BUILTIN.__module__
    monkeypatch.setenv("FLASHMLA_BACKEND_DISABLE", "1")
    register()
    assert BACKENDS["flashmla"] is BUILTIN
    assert "FLASHMLA_BACKEND_DISABLE is set; SGLang keeps its own flashmla" in log.text


def test_draft_workers_and_prompts_come_to_us() -> None:
    register()
    from flashmla_backend.integration.sglang import backend, draft, prefill

    of_drafts = import_module(compat.DRAFT_MODULE)
    assert BACKENDS["flashmla"] is of_drafts.FlashMLABackend is backend.FlashMLABackend
    assert of_drafts.FlashMLAMultiStepDraftBackend is draft.FlashMLAMultiStepDraftBackend
    assert AttentionBackendRegistry.get_handler("flashmla") is prefill.dispatch
    assert FORWARD_ABSORB_CORE_ATTENTION_BACKENDS.count("flashmla") == 1


def test_registering_again_changes_and_says_nothing(log: pytest.LogCaptureFixture) -> None:
    register()
    ours, said = BACKENDS["flashmla"], len(log.records)
    register()
    assert plugin.owns_flashmla() and BACKENDS["flashmla"] is ours
    assert len(log.records) == said == 1


def test_a_backend_claimed_by_another_plugin_stays_theirs(log: pytest.LogCaptureFixture) -> None:
    def theirs(runner: Any) -> None:
        raise NotImplementedError

    BACKENDS["flashmla"] = theirs
    register()
    assert BACKENDS["flashmla"] is theirs
    assert "another plugin has already claimed flashmla" in log.text and "theirs" in log.text
    assert "SGLANG_PLUGINS" in log.text


@pytest.mark.parametrize(
    ("capability", "cuda", "said"),
    [
        ((8, 9), "13.0", r"Made-up GPU \(compute capability 8.9\) has no decode kernels that SGLang could"),
        ((10, 0), "13.0", r"compute capability 10.0\) has no decode kernels"),
        ((9, 0), None, "Made-up GPU is no NVIDIA GPU"),
    ],
)
def test_other_gpus_are_left_to_sglang(
    capability: tuple[int, int],
    cuda: str | None,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    log: pytest.LogCaptureFixture,
) -> None:
    make_up_gpu(monkeypatch, capability, cuda)
    register()
    assert BACKENDS["flashmla"] is BUILTIN and compat.DRAFT_MODULE not in sys.modules
    assert re.search(said, log.text) and "SGLang keeps its own flashmla" in log.text


def test_hopper_is_claimed_where_the_kernels_are(
    monkeypatch: pytest.MonkeyPatch, log: pytest.LogCaptureFixture
) -> None:
    make_up_gpu(monkeypatch, (9, 0), "13.0")
    monkeypatch.setattr("flashmla_backend.native.unavailable_reason", lambda: "the kernels were not built")
    register()
    assert BACKENDS["flashmla"] is BUILTIN and "the kernels were not built" in log.text
    monkeypatch.setattr("flashmla_backend.native.unavailable_reason", lambda: None)
    register()
    assert plugin.owns_flashmla()


def make_up_gpu(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], cuda: str | None) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Made-up GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(torch.version, "cuda", cuda)


@pytest.mark.parametrize("found", ["0.5.15", "0.5.17.post1", "0.5.20rc1", "0.5.23"])
def test_supported_versions(found: str) -> None:
    compat.check_version(found)


@pytest.mark.parametrize("found", ["0.5.14", "0.5.14.post3", "0.5.24", "0.6.0", "1.0", "dev"])
def test_other_versions_are_refused_by_name(found: str) -> None:
    with pytest.raises(Unsupported) as refusal:
        compat.check_version(found)
    for part in (f"{found}", "0.5.15 to 0.5.23", "install one of those", "FLASHMLA_BACKEND_DISABLE=1"):
        assert part in str(refusal.value)


def test_an_unsupported_version_leaves_the_builtin(
    monkeypatch: pytest.MonkeyPatch, log: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("sglang.version.__version__", "0.5.99")
    register()
    assert BACKENDS["flashmla"] is BUILTIN
    assert compat.DRAFT_MODULE not in sys.modules
    assert "flashmla" not in FORWARD_ABSORB_CORE_ATTENTION_BACKENDS
    (said,) = log.records
    assert said.levelname == "WARNING"
    assert "SGLang 0.5.99 is not supported" in log.text and "SGLang keeps its own flashmla" in log.text


@pytest.mark.parametrize(
    ("used", "complaint"),
    [
        ({"sglang.srt.layers.attention.nowhere": {"Backend": ()}}, "nowhere.Backend is gone"),
        ({"sglang.srt.mem_cache.memory_pool": {"KVWriteLoc.away": ()}}, "memory_pool.KVWriteLoc.away is gone"),
        ({"sglang.srt.mem_cache.memory_pool": {"KVWriteLoc": ("loc", "row")}}, "memory_pool.KVWriteLoc takes no row"),
    ],
)
def test_moved_internals_leave_the_builtin(
    used: dict[str, Any], complaint: str, monkeypatch: pytest.MonkeyPatch, log: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(compat, "USED", used)
    register()
    assert BACKENDS["flashmla"] is BUILTIN
    assert complaint in log.text and "SGLang keeps its own flashmla" in log.text


def test_a_failure_is_logged_not_raised(monkeypatch: pytest.MonkeyPatch, log: pytest.LogCaptureFixture) -> None:
    def broken() -> None:
        raise RuntimeError("no such luck")

    monkeypatch.setattr(plugin, "claim_flashmla", broken)
    register()
    assert "SGLang keeps its own flashmla" in log.text and "no such luck" in log.text
