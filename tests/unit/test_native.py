"""The compiled module: it loads without a GPU and without torch, and its absence is told in words."""

from __future__ import annotations

import importlib.abc
import importlib.metadata
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from flashmla_backend import native
from flashmla_backend.errors import InvalidArgument, Unsupported

MODULE = "flashmla_backend._native"


def test_the_compiled_module_is_available() -> None:
    assert native.unavailable_reason() is None
    assert native.available()


def test_build_info_is_that_of_this_package() -> None:
    info = native.build_info()
    assert info.version == importlib.metadata.version("flashmla_backend")
    assert info.arch == "sm_90a"
    assert tuple(int(part) for part in info.cuda_version.split(".")) >= (12, 8)
    assert info.cutlass_version.startswith("4.")
    assert info.compiler.startswith(f"nvcc {info.cuda_version}")


def test_devices_are_those_torch_sees() -> None:
    torch = pytest.importorskip("torch")
    devices = native.devices()
    if not torch.version.cuda:
        pytest.skip("a CPU build of torch sees no devices")
    assert len(devices) == torch.cuda.device_count()
    for device in devices:
        properties = torch.cuda.get_device_properties(device.index)
        assert device.name == properties.name
        assert device.compute_capability == (properties.major, properties.minor)
        assert device.sm_count == properties.multi_processor_count
        assert device.memory_bytes == properties.total_memory
        assert device.l2_bytes == properties.L2_cache_size
        assert int(device.driver_version.split(".")[0]) >= 12


def run_python(code: str, **env: str) -> str:
    """What a fresh interpreter prints."""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **env}, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_no_visible_gpu_is_an_empty_list_and_no_error() -> None:
    code = "from flashmla_backend import native; print(native.devices())"
    assert run_python(code, CUDA_VISIBLE_DEVICES="") == "[]"


@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler to make a driver with")
def test_a_driver_that_is_too_old_is_told_in_words(tmp_path: Path) -> None:
    source = tmp_path / "libcuda.c"
    source.write_text(
        "int cuInit(unsigned f) { return 0; }\nint cuDriverGetVersion(int *v) { *v = 11040; return 0; }\n"
    )
    subprocess.run(["cc", "-shared", "-fPIC", "-o", tmp_path / "libcuda.so.1", source], check=True)
    code = """
from flashmla_backend import native
try:
    native.devices()
except native.Unsupported as error:
    print(error)
"""
    message = run_python(code, LD_LIBRARY_PATH=str(tmp_path))
    assert "driver serves CUDA up to 11.4" in message
    assert "update the driver" in message


def test_the_compiled_module_needs_no_torch() -> None:
    code = (
        "import sys; sys.modules['torch'] = None; from flashmla_backend import native; print(native.build_info().arch)"
    )
    assert run_python(code) == "sm_90a"


@pytest.mark.parametrize("index", [-1, 1000])
def test_probing_a_device_that_is_not_there_names_the_index(index: int) -> None:
    with pytest.raises(InvalidArgument, match=f"index: {index}, but this machine has [0-9]+ visible CUDA device"):
        native.probe_failure(index)


def test_the_probe_runs_on_every_hopper_gpu_and_is_refused_elsewhere() -> None:
    devices = native.devices()
    if not devices:
        pytest.skip("no GPU")
    for device in devices:
        failure = native.probe_failure(device.index)
        if device.compute_capability == (9, 0):
            assert failure is None
        else:
            assert failure is not None
            assert device.name in failure


class Blocker(importlib.abc.MetaPathFinder):
    """Makes the import of the compiled module fail with the given error."""

    def __init__(self, error: ImportError) -> None:
        self.error = error

    def find_spec(self, fullname: str, path: object, target: object = None) -> None:
        if fullname == MODULE:
            raise self.error


def forget() -> None:
    native.unavailable_reason.cache_clear()
    native.load.cache_clear()


@pytest.fixture
def broken(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(sys, "meta_path", [Blocker(request.param), *sys.meta_path])
    monkeypatch.delitem(sys.modules, MODULE, raising=False)
    forget()
    yield
    forget()


MISSING = ModuleNotFoundError(f"No module named {MODULE!r}", name=MODULE)
UNLOADABLE = ImportError("libstdc++.so.6: version `GLIBCXX_3.4.30' not found")


@pytest.mark.parametrize(
    ("broken", "reason"),
    [(MISSING, "is not there: .*pip install"), (UNLOADABLE, r"does not load \(.*GLIBCXX_3.4.30.*\); rebuild")],
    indirect=["broken"],
)
def test_an_unavailable_module_is_explained(broken: None, reason: str) -> None:
    assert not native.available()
    for call in (native.build_info, native.devices, lambda: native.probe_failure(0)):
        with pytest.raises(Unsupported, match=reason):
            call()
