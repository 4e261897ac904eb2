"""`flashmla serve` as a user starts and ends it."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

FLASHMLA = Path(sys.executable).with_name("flashmla")
START_SECONDS = 300


@dataclass
class Server:
    """A running `flashmla serve`."""

    url: str
    process: subprocess.Popen[str]
    log: list[str]  # lines so far


@contextmanager
def serving(arguments: Sequence[str], environment: dict[str, str], cpus: set[int] | None = None) -> Iterator[Server]:
    """`flashmla serve` with these arguments on a free port, once it answers; one SIGINT must end it cleanly.

    It runs on `cpus`, if not on all that this process may use.
    """
    port = _free_port()
    process = subprocess.Popen(
        [str(FLASHMLA), "serve", "--port", str(port), *arguments],
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if cpus is not None:
        os.sched_setaffinity(process.pid, cpus)  # its own processes inherit that
    server = Server(f"http://127.0.0.1:{port}", process, log=[])
    threading.Thread(target=lambda: server.log.extend(process.stdout or []), daemon=True).start()
    try:
        deadline = time.monotonic() + START_SECONDS
        while not any(f"answers at {server.url}" in line for line in server.log):
            assert process.poll() is None, f"the server ended:\n{''.join(server.log[-40:])}"
            assert time.monotonic() < deadline, f"not up after {START_SECONDS} s:\n{''.join(server.log[-40:])}"
            time.sleep(0.2)
        yield server
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=60) == 0, "".join(server.log[-40:])
    finally:
        if process.poll() is None:  # the second signal ends all of the server's processes
            process.send_signal(signal.SIGINT)
            process.send_signal(signal.SIGTERM)
            process.wait(timeout=30)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
