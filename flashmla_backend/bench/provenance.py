"""Where a report comes from: the fields that every JSON under benchmarks/results begins with."""

from __future__ import annotations

import datetime
import json
import re
import shlex
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch


def provenance(device: str, command: Sequence[str], commit: str | None) -> dict[str, Any]:
    """`command` in words, whose absolute paths are cut to their last part; `commit` where git cannot tell."""
    return {
        "device": device,
        "torch": torch.__version__,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": commit or git_commit(),
        "command": shlex.join(re.sub(r"(^|=)/.*/", r"\1", word) for word in command),
    }


def git_commit() -> str | None:
    """The commit of this source tree, None where there is no git or no repository."""
    try:
        command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def write(report: dict[str, Any], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1) + "\n")
