"""What the `flashmla` command knows about SGLang: whether it is here, who serves in it, and how to start its server.

Versions are read without importing SGLang. Who serves is asked of SGLang itself, in a process of its own.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from importlib import metadata

from . import doctor
from .doctor import Finding
from .errors import Unsupported
from .serve import Server

ENTRY_POINT_GROUP, ENTRY_POINT = "sglang.srt.plugins", "flashmla_backend"
INSTALL = 'pip install "flashmla_backend[sglang]"; on a CPU: make setup ENGINE=sglang'

DEFAULT_MODEL_ARGUMENTS = ["--context-length", "8192", "--max-total-tokens", "131072", "--max-running-requests", "64"]
# For the CPU SGLang has no rotary embedding but yarn's. This one stretches nothing: it is the model's own.
IDLE_YARN = {
    "rope_scaling": {
        "rope_type": "yarn",
        "factor": 1.0,
        "original_max_position_embeddings": 16384,
        "beta_fast": 32,
        "beta_slow": 1,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
    }
}

_ASK = """
import logging
logging.basicConfig(level=logging.INFO)  # a plugin that declines says why
from flashmla_backend.integration.sglang import cpu
cpu.prepare()
from sglang.srt.plugins import load_plugins
load_plugins()
from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS
served_by = ATTENTION_BACKENDS["flashmla"]
print("served by", f"{served_by.__module__}.{served_by.__qualname__}")
"""


class SglangServer(Server):
    """`flashmla serve --engine sglang`."""

    engine = "SGLang"

    def command(self) -> list[str]:
        """Not SGLang's own module: ours also starts where there is no GPU."""
        return [
            *(sys.executable, "-m", "flashmla_backend.integration.sglang.server"),
            *("--model-path", self.model, "--served-model-name", self.name),
            *("--host", self.host, "--port", str(self.port)),
            *("--attention-backend", self.attention_backend),
            *(("--device", "cpu", "--sleep-on-idle") if runs_on_cpu() else ()),  # an idle server takes a core else
            *self.arguments,
        ]

    def environment(self) -> dict[str, str]:
        """The caller's environment; on the CPU without Inductor, whose compilations outlast a small model's answers."""
        environment = {**os.environ, **doctor.INSTALLED_PACKAGES_ONLY}
        if runs_on_cpu():
            environment.setdefault("TORCH_COMPILE_DISABLE", "1")
        return environment


def default_model_arguments() -> list[str]:
    """For the embedded default, which has plain rotary embeddings."""
    if not runs_on_cpu():
        return DEFAULT_MODEL_ARGUMENTS
    return [*DEFAULT_MODEL_ARGUMENTS, "--json-model-override-args", json.dumps(IDLE_YARN)]


def distribution() -> str | None:
    """The version of the installed SGLang."""
    try:
        return metadata.version("sglang")
    except metadata.PackageNotFoundError:
        return None


def runs_on_cpu() -> bool:
    """Whether the installed SGLang stands beside a torch for CPUs."""
    try:
        return distribution() is not None and metadata.version("torch").endswith("+cpu")
    except metadata.PackageNotFoundError:
        return False


def check_installed() -> None:
    """Raises Unsupported unless an SGLang is installed."""
    if distribution() is None:
        raise Unsupported(f"SGLang is not installed: {INSTALL}")


def findings() -> tuple[list[Finding], str | None]:
    """What `flashmla doctor` reports of an installed SGLang, and what runs MLA decode in it, None if not we."""
    served_by, decode_path = _who_serves()
    return [_version(), _entry_point(), served_by], decode_path


def _version() -> Finding:
    from .integration.sglang import compat

    found = distribution()
    assert found is not None
    try:
        compat.check_version(found)
    except Unsupported as refusal:
        return Finding("SGLang", found, "missing", str(refusal))
    return Finding("SGLang", f"{found}, supported", "ok")


def _entry_point() -> Finding:
    subject = "SGLang entry point"
    if any(point.name == ENTRY_POINT for point in metadata.entry_points(group=ENTRY_POINT_GROUP)):
        return Finding(subject, ENTRY_POINT, "ok")
    return Finding(subject, f"not registered: {ENTRY_POINT} in {ENTRY_POINT_GROUP}", "missing", doctor.REINSTALL)


def _who_serves() -> tuple[Finding, str | None]:
    """Lets SGLang load its plugins and say which class `--attention-backend flashmla` selects."""
    subject = "--attention-backend flashmla in SGLang"
    environment = {**os.environ, **doctor.INSTALLED_PACKAGES_ONLY}
    asked = subprocess.run([sys.executable, "-c", _ASK], capture_output=True, text=True, env=environment)
    answer = re.search(r"served by (\S+)", asked.stdout)
    if answer is None:
        last = (asked.stderr.strip() or "no output").splitlines()[-1]
        return Finding(subject, f"SGLang does not start: {last}", "missing", "repair the SGLang installation"), None
    if not answer[1].startswith("flashmla_backend."):
        return doctor.served_by_others(subject, answer[1], asked.stderr, plugins="SGLANG_PLUGINS"), None
    from .dispatch import NAMES  # brings torch

    path = NAMES["cpu" if runs_on_cpu() else "sm90"]
    return Finding(subject, f"flashmla_backend, {path}", "ok"), path
