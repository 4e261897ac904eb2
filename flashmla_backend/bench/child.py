"""A Python module run in a process of its own, which says on standard output what it is at."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

MARK = "@ "
LAST_LINES = 15


def run_child(
    arguments: list[str],
    environment: Mapping[str, str],
    log: Path,
    timeout_s: float,
    progressed: Callable[[str], None],
) -> int:
    """Runs `python -m arguments...` to its end, or kills it and all it started after `timeout_s`. Returns its code.

    What ends this call early, Ctrl-C say, ends them too: no signal to us reaches them, who are a session of their own.

    environment: on top of ours. log: receives its output. progressed: what follows MARK in lines that begin with it.
    """
    with (
        log.open("w") as copy,
        subprocess.Popen(
            [sys.executable, "-m", *arguments],
            env={**os.environ, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        ) as child,
    ):
        watchdog = threading.Timer(timeout_s, os.killpg, (child.pid, signal.SIGKILL))
        watchdog.start()
        assert child.stdout is not None
        try:
            for line in child.stdout:
                copy.write(line)
                if line.startswith(MARK):
                    progressed(line.removeprefix(MARK).strip())
            return child.wait()
        finally:
            watchdog.cancel()
            if child.poll() is None:
                os.killpg(child.pid, signal.SIGKILL)


def ask_child(
    module: str,
    request: Mapping[str, Any],
    environment: Mapping[str, str],
    log: Path,
    timeout_s: float,
    progressed: Callable[[str], None],
) -> tuple[dict[str, Any] | None, str | None]:
    """Runs `python -m module request.json answer.json`, see run_child.

    Returns what it answered, if anything, and what went wrong, if anything: who fails may have answered before.
    """
    with tempfile.TemporaryDirectory() as scratch:
        request_path, answer_path = Path(scratch) / "request.json", Path(scratch) / "answer.json"
        request_path.write_text(json.dumps(request))
        code = run_child([module, str(request_path), str(answer_path)], environment, log, timeout_s, progressed)
        answer = json.loads(answer_path.read_text()) if answer_path.exists() else None
    return answer, f"ended with code {code} ({log}):\n{last_lines(log)}" if code else None


def say(what: str) -> None:
    """For `progressed` of who runs this process."""
    print(f"{MARK}{what}", flush=True)


def write_answer(path: str, answer: Mapping[str, Any]) -> None:
    """Of this process, for ask_child. What is there stays, and whole, should a later part fail or be killed."""
    partial = Path(f"{path}.partial")
    partial.write_text(json.dumps(answer))
    partial.replace(path)


def last_lines(log: Path) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-LAST_LINES:])
