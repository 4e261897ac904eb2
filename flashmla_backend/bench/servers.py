"""A server of any engine, started for a measurement and ended after it."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from flashmla_backend.bench.child import last_lines
from flashmla_backend.errors import FlashMLAError

STOP_SECONDS = 30


class ServerFailed(FlashMLAError, RuntimeError):
    """The server did not come up."""


@dataclass(frozen=True)
class HttpServer:
    """What to start, where it answers, and where its output goes."""

    command: list[str]
    environment: dict[str, str]
    url: str
    log: Path


@contextmanager
def running(server: HttpServer, start_seconds: float) -> Iterator[subprocess.Popen[bytes]]:
    """The server's process, from its first answer to /health on. It leads a process group of its own.

    Raises ServerFailed, with the last lines of the log, if it ends or takes longer than `start_seconds`.
    """
    server.log.parent.mkdir(parents=True, exist_ok=True)
    with (
        server.log.open("wb") as log,
        subprocess.Popen(
            server.command, env=server.environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        ) as process,
    ):
        try:
            _wait_until_healthy(server, process, start_seconds)
            yield process
        finally:
            _stop(process)


def free_port() -> int:
    """A port of this machine that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _wait_until_healthy(server: HttpServer, process: subprocess.Popen[bytes], start_seconds: float) -> None:
    deadline = time.monotonic() + start_seconds
    while True:
        try:
            with urllib.request.urlopen(f"{server.url}/health", timeout=5):
                return
        except (urllib.error.URLError, OSError):
            pass
        if (code := process.poll()) is not None:
            raise ServerFailed(f"the server ended with code {code} ({server.log}):\n{last_lines(server.log)}")
        if time.monotonic() > deadline:
            raise ServerFailed(
                f"the server was not up after {start_seconds:.0f} s ({server.log}):\n{last_lines(server.log)}"
            )
        time.sleep(0.3)


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Politely, then with all its processes: a worker may outlive the server and hold its memory."""
    process.send_signal(signal.SIGTERM)
    with suppress(subprocess.TimeoutExpired):
        process.wait(STOP_SECONDS)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
