"""Who serves FLASHMLA: us, in every process; or whoever was there before us, with the reason in the log."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import entry_points
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from vllm.platforms import current_platform
from vllm.platforms.interface import DeviceCapability
from vllm.plugins import load_general_plugins
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

from flashmla_backend import native
from flashmla_backend.checkpoint import Architecture
from flashmla_backend.errors import Unsupported
from flashmla_backend.integration.vllm import compat, cpu_platform, plugin, register
from tests.greedy import Reference

from .conftest import EngineRun

FLASHMLA = AttentionBackendEnum.FLASHMLA
THEIRS = "other.package.TheirBackend"


@pytest.fixture(autouse=True)
def unclaimed() -> Iterator[None]:
    FLASHMLA.clear_override()
    yield
    FLASHMLA.clear_override()


def test_entry_points_are_installed() -> None:
    (general,) = entry_points(group="vllm.general_plugins", name="flashmla_backend")
    (platform,) = entry_points(group="vllm.platform_plugins", name="flashmla_backend_cpu")
    assert (general.load(), platform.load()) == (register, cpu_platform)


def test_registering_again_changes_and_says_nothing(log: pytest.LogCaptureFixture) -> None:
    register()
    assert FLASHMLA.get_path() == plugin.BACKEND_PATH
    said = len(log.records)
    register()
    assert FLASHMLA.get_path() == plugin.BACKEND_PATH
    assert len(log.records) == said == 1


def test_a_spawned_process_resolves_the_same_class() -> None:
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn, initializer=load_general_plugins) as pool:
        there = pool.submit(AttentionBackendEnum.get_path, FLASHMLA).result()
        backend = pool.submit(AttentionBackendEnum.get_class, FLASHMLA).result()
    assert there == plugin.BACKEND_PATH
    assert (backend.__module__, backend.__name__) == tuple(plugin.BACKEND_PATH.rsplit(".", 1))


def test_this_machine_gets_our_platform() -> None:
    path = f"{type(current_platform).__module__}.{type(current_platform).__qualname__}"
    assert path == cpu_platform() in plugin.CPU_PLATFORMS.values()


def test_the_class_names_itself_as_selected() -> None:
    register()
    assert FLASHMLA.get_class().get_name() == "FLASHMLA"


@pytest.mark.parametrize("builtin", plugin.CPU_PLATFORMS)
def test_platform_keeps_vllms_choice_as_its_base(builtin: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.utils.import_utils import resolve_obj_by_qualname

    monkeypatch.setattr("vllm.platforms.cpu_platform_plugin", lambda: builtin)
    chosen = cpu_platform()
    assert chosen is not None
    assert issubclass(resolve_obj_by_qualname(chosen), resolve_obj_by_qualname(builtin))


def test_no_platform_on_a_gpu_build(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vllm.platforms.cpu_platform_plugin", lambda: None)
    assert cpu_platform() is None


def test_unknown_cpu_platform_is_left_alone(monkeypatch: pytest.MonkeyPatch, log: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr("vllm.platforms.cpu_platform_plugin", lambda: "vllm.platforms.new.NewCpuPlatform")
    assert cpu_platform() is None
    assert "vllm.platforms.new.NewCpuPlatform" in log.text


def test_disabled_by_the_environment(monkeypatch: pytest.MonkeyPatch, log: pytest.LogCaptureFixture) -> None:
    builtin = FLASHMLA.get_path()
    monkeypatch.setenv("FLASHMLA_BACKEND_DISABLE", "1")
    register()
    assert FLASHMLA.get_path() == builtin
    assert cpu_platform() is None
    assert "FLASHMLA_BACKEND_DISABLE is set" in log.text


def test_disabled_engine_runs_vllms_own_backend(
    checkpoint: Callable[[Architecture], Path],
    reference: Callable[[Architecture], tuple[Reference, Reference]],
    run_engine: Callable[..., EngineRun],
) -> None:
    alone, _ = reference("v2-moe")
    run = run_engine(
        [alone.prompts[:6]],
        environment={"FLASHMLA_BACKEND_DISABLE": "1"},
        model=str(checkpoint("v2-moe")),
        dtype="float32",
        # On a CPU with AMX vLLM takes a backend that knows no fp32, unless asked for the other one by name.
        attention_backend="CPU_MLA" if torch.cpu._is_amx_tile_supported() else "flashmla",
        compilation_config={"custom_ops": ["-rotary_embedding"]},  # as our platform has it, see platform.py
        enforce_eager=True,
        max_model_len=512,
        kv_cache_memory_bytes=128 << 20,
    )
    assert not run.backend.startswith("flashmla_backend")
    assert "serves MLA decode" not in run.log
    assert run.tokens == [alone.tokens[:6]]


def test_a_backend_claimed_by_another_plugin_stays_theirs(log: pytest.LogCaptureFixture) -> None:
    register_backend(FLASHMLA, THEIRS)
    register()
    assert FLASHMLA.get_path() == THEIRS
    assert f"already claimed FLASHMLA for {THEIRS}" in log.text
    assert "VLLM_PLUGINS" in log.text
    assert not plugin.owns_flashmla()


@pytest.mark.parametrize("found", ["0.26.0", "0.30.2", "0.32.0+cpu", "0.33.1rc1"])
def test_supported_versions(found: str) -> None:
    compat.check_version(found)


@pytest.mark.parametrize("found", ["0.25.9", "0.34.0", "1.0.0", "dev"])
def test_other_versions_are_refused_by_name(found: str) -> None:
    with pytest.raises(Unsupported) as refusal:
        compat.check_version(found)
    for part in (found, "0.26 to 0.33", "install one of those", "FLASHMLA_BACKEND_DISABLE=1"):
        assert part in str(refusal.value)


def test_cpu_needs_a_vllm_with_mla_on_the_cpu() -> None:
    with pytest.raises(Unsupported, match=r"vLLM 0\.26\.0 is not supported; vLLM 0\.32 to 0\.33 works"):
        compat.check_version("0.26.0", oldest=compat.OLDEST_ON_CPU)


def test_unsupported_version_leaves_vllm_as_it_was(
    monkeypatch: pytest.MonkeyPatch, log: pytest.LogCaptureFixture
) -> None:
    builtin = FLASHMLA.get_path()
    monkeypatch.setattr(compat, "NEWEST", (0, 27))
    register()
    assert FLASHMLA.get_path() == builtin
    assert cpu_platform() is None
    assert "is not supported; vLLM 0.26 to 0.27 works" in log.text


def made_up_gpu(capability: tuple[int, int] | None) -> SimpleNamespace:
    return SimpleNamespace(
        is_cpu=lambda: False,
        is_cuda=lambda: True,
        get_device_capability=lambda: capability and DeviceCapability(*capability),
        get_device_name=lambda: "Made-up GPU",
    )


def test_on_hopper_flashmla_is_ours(monkeypatch: pytest.MonkeyPatch, log: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr("vllm.platforms._current_platform", made_up_gpu((9, 0)))
    monkeypatch.setattr(native, "unavailable_reason", lambda: None)
    info = native.BuildInfo("0.1.0", "13.0", "sm_90a", "4.2.0", "nvcc")
    monkeypatch.setattr(native, "build_info", lambda: info)
    register()
    assert FLASHMLA.get_path() == plugin.BACKEND_PATH
    assert "selects flashmla_backend." in log.text


@pytest.mark.parametrize(
    ("platform", "reason"),
    [
        (made_up_gpu((8, 9)), r"Made-up GPU (compute capability 8.9) has no decode kernels"),
        (made_up_gpu((10, 0)), "ours run on 9.0 (Hopper) only"),
        (made_up_gpu(None), "cannot tell the GPU's compute capability"),
        (SimpleNamespace(is_cpu=lambda: False, is_cuda=lambda: False), "serves it on Hopper GPUs and on CPUs"),
    ],
    ids=["8.9", "10.0", "unknown", "no NVIDIA GPU"],
)
def test_on_other_devices_the_builtin_stays(
    platform: SimpleNamespace, reason: str, monkeypatch: pytest.MonkeyPatch, log: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("vllm.platforms._current_platform", platform)
    register()
    assert not FLASHMLA.is_overridden()
    assert reason in log.text
    assert "vLLM keeps its own FLASHMLA" in log.text


def test_hopper_without_our_kernels_keeps_the_builtin(
    monkeypatch: pytest.MonkeyPatch, log: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("vllm.platforms._current_platform", made_up_gpu((9, 0)))
    monkeypatch.setattr(native, "unavailable_reason", lambda: "the module is not built")
    register()
    assert not FLASHMLA.is_overridden()
    assert "the module is not built" in log.text


def test_a_foreign_cpu_platform_is_named(monkeypatch: pytest.MonkeyPatch, log: pytest.LogCaptureFixture) -> None:
    from vllm.platforms.cpu import CpuPlatform

    monkeypatch.setattr("vllm.platforms._current_platform", CpuPlatform())
    register()
    assert not FLASHMLA.is_overridden()
    assert "vllm.platforms.cpu.CpuPlatform" in log.text
    assert "VLLM_TARGET_DEVICE" in log.text


def test_a_failure_is_logged_not_raised(monkeypatch: pytest.MonkeyPatch, log: pytest.LogCaptureFixture) -> None:
    def broken() -> None:
        raise RuntimeError("no such luck")

    monkeypatch.setattr(plugin, "claim_flashmla", broken)
    register()
    assert "vLLM keeps its own FLASHMLA" in log.text
    assert "no such luck" in log.text
