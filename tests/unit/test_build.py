"""Where a build finds its compiler, and what its wheel may hold. The nvcc here are scripts that tell a version."""

from __future__ import annotations

import sys
from pathlib import Path

import check_wheel
import pytest
import toolkit

NOWHERE = Path("/nonexistent")


def make_nvcc(root: Path, release: str) -> Path:
    """An executable that answers `--version` as the nvcc of that release does."""
    nvcc = root / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text(f"#!/bin/sh\necho 'Cuda compilation tools, release {release}, V{release}.88'\n")
    nvcc.chmod(0o755)
    return nvcc


def test_a_system_nvcc_needs_only_cutlass_from_pypi(tmp_path: Path) -> None:
    nvcc = toolkit.system_nvcc({"PATH": str(make_nvcc(tmp_path, "12.8").parent)}, NOWHERE)
    assert nvcc == toolkit.Nvcc(tmp_path / "bin" / "nvcc", (12, 8))
    assert toolkit.requirements(nvcc, "Linux x86_64") == [toolkit.PYPI_CUTLASS]


def test_places_are_searched_in_the_documented_order(tmp_path: Path) -> None:
    cudacxx, cuda_home, path, default = (make_nvcc(tmp_path / name, "13.0") for name in ("a", "b", "c", "d"))
    env = {"CUDACXX": str(cudacxx), "CUDA_HOME": str(tmp_path / "b"), "PATH": str(path.parent)}
    for expected, variable in [(cudacxx, "CUDACXX"), (cuda_home, "CUDA_HOME"), (path, "PATH")]:
        nvcc = toolkit.system_nvcc(env, tmp_path / "d")
        assert nvcc is not None
        assert nvcc.path == expected
        del env[variable]
    nvcc = toolkit.system_nvcc(env, tmp_path / "d")
    assert nvcc is not None
    assert nvcc.path == default


def test_cudacxx_may_be_a_bare_command_name(tmp_path: Path) -> None:
    nvcc = toolkit.system_nvcc({"CUDACXX": "nvcc", "PATH": str(make_nvcc(tmp_path, "13.0").parent)}, NOWHERE)
    assert nvcc is not None
    assert nvcc.path == tmp_path / "bin" / "nvcc"


@pytest.mark.parametrize("release", ["11.8", "12.7"])
def test_a_system_nvcc_that_is_too_old_is_passed_over_aloud(
    tmp_path: Path, release: str, capsys: pytest.CaptureFixture[str]
) -> None:
    old = make_nvcc(tmp_path, release)
    nvcc = toolkit.system_nvcc({"PATH": str(old.parent)}, NOWHERE)
    assert nvcc is None
    assert toolkit.requirements(nvcc, "Linux x86_64") == [toolkit.PYPI_CUTLASS, *toolkit.PYPI_NVCC]
    message = capsys.readouterr().err
    assert str(old) in message
    assert f"is release {release}, >= 12.8 is needed" in message


def test_an_old_nvcc_first_in_line_does_not_hide_a_new_one(tmp_path: Path) -> None:
    old, new = make_nvcc(tmp_path / "old", "12.4"), make_nvcc(tmp_path / "new", "13.0")
    nvcc = toolkit.system_nvcc({"PATH": str(old.parent)}, new.parent.parent)
    assert nvcc == toolkit.Nvcc(new, (13, 0))


def test_a_cudacxx_that_does_not_exist_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert toolkit.system_nvcc({"CUDACXX": "/nonexistent/nvcc"}, NOWHERE) is None
    assert "/nonexistent/nvcc: it does not run" in capsys.readouterr().err


def test_the_system_nvcc_can_be_ignored(tmp_path: Path) -> None:
    env = {"PATH": str(make_nvcc(tmp_path, "13.0").parent), "FLASHMLA_BUILD_NVCC": "pypi"}
    assert toolkit.system_nvcc(env, NOWHERE) is None


def test_an_unknown_choice_of_nvcc_is_refused() -> None:
    with pytest.raises(toolkit.BuildError, match="FLASHMLA_BUILD_NVCC is 'conda'; it may be 'pypi' or unset"):
        toolkit.system_nvcc({"FLASHMLA_BUILD_NVCC": "conda"}, NOWHERE)


def test_pypi_packages_are_one_cuda_release() -> None:
    """A newer nvvm than ptxas does not compile; nvcc's own requirements would allow it."""
    assert len({package.partition("==")[2] for package in toolkit.PYPI_NVCC}) == 1


def test_a_platform_without_pypi_compiler_is_refused_in_one_sentence() -> None:
    with pytest.raises(toolkit.BuildError) as error:
        toolkit.requirements(None, "Darwin arm64")
    message = str(error.value)
    assert "Darwin arm64" in message
    assert "CUDACXX" in message
    assert "\n" not in message


@pytest.fixture
def site_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An environment in which nothing but the test's own packages is installed."""
    folder = tmp_path / "site-packages"
    folder.mkdir()
    monkeypatch.setattr(sys, "path", [str(folder)])
    for name in [name for name in sys.modules if name.partition(".")[0] in ("nvidia", "cutlass_library")]:
        monkeypatch.delitem(sys.modules, name)
    return folder


def make_cutlass(site_packages: Path) -> Path:
    include = site_packages / "cutlass_library" / "source" / "include"
    (include / "cutlass").mkdir(parents=True)
    (include / "cutlass" / "version.h").touch()
    return include


def test_a_build_without_any_nvcc_says_so_in_one_sentence(site_packages: Path) -> None:
    make_cutlass(site_packages)
    with pytest.raises(toolkit.BuildError) as error:
        toolkit.select({"FLASHMLA_BUILD_NVCC": "pypi"})
    message = str(error.value)
    assert "no CUDA compiler" in message
    assert "CUDA toolkit >= 12.8" in message
    assert all(package in message for package in toolkit.PYPI_NVCC)
    assert "\n" not in message


def test_the_nvcc_of_the_pypi_packages_is_found_with_its_libraries(site_packages: Path) -> None:
    include = make_cutlass(site_packages)
    root = site_packages / "nvidia" / "cu13"
    nvcc = make_nvcc(root, "13.0")
    expected = toolkit.Nvcc(nvcc, (13, 0), lib=root / "lib")
    assert toolkit.select({"FLASHMLA_BUILD_NVCC": "pypi"}) == (expected, include)


def test_a_build_without_cutlass_names_the_package(site_packages: Path, tmp_path: Path) -> None:
    nvcc = make_nvcc(tmp_path, "13.0")
    with pytest.raises(toolkit.BuildError, match=f"no CUTLASS headers: .*'{toolkit.PYPI_CUTLASS}'"):
        toolkit.select({"CUDACXX": str(nvcc)})


WHEEL = [
    "flashmla_backend/__init__.py",
    "flashmla_backend/_native.cpython-312-x86_64-linux-gnu.so",
    "flashmla_backend/integration/__init__.py",
    "flashmla_backend/integration/vllm/__init__.py",
    "flashmla_backend/integration/sglang/__init__.py",
    "flashmla_backend/integration/vllm/impl.py",
    "flashmla_backend/py.typed",
    "flashmla_backend-0.1.0.dist-info/METADATA",
    "flashmla_backend-0.1.0.dist-info/RECORD",
    "flashmla_backend-0.1.0.dist-info/WHEEL",
    "flashmla_backend-0.1.0.dist-info/entry_points.txt",
    "flashmla_backend-0.1.0.dist-info/licenses/LICENSE",
]


def test_a_complete_wheel_has_no_faults() -> None:
    assert check_wheel.faults(WHEEL) == []


@pytest.mark.parametrize("name", [name for name in WHEEL if not name.endswith("impl.py")])
def test_a_wheel_that_lacks_a_file_is_faulted(name: str) -> None:
    (fault,) = check_wheel.faults(set(WHEEL) - {name})
    assert fault.startswith("missing: ")


@pytest.mark.parametrize(
    "name",
    [
        "tests/unit/test_build.py",
        "integration/vllm/impl.py",
        "flashmla_backend/kernels/sm90/probe.cu",
        "flashmla_backend/libflashmla_kernels.a",
        "flashmla_backend/__pycache__/api.cpython-312.pyc",
    ],
)
def test_a_stray_file_in_a_wheel_is_faulted(name: str) -> None:
    assert check_wheel.faults([*WHEEL, name]) == [f"unexpected: {name}"]
