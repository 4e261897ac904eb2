"""Who serves flashmla: us, in every process; or whoever was there before us, with the reason in the log."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any

import pytest
from sglang.srt.layers.attention import attention_registry
from sglang.srt.models.deepseek_common.attention_backend_handler import AttentionBackendRegistry

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
