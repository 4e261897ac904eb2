"""An engine's OpenAI-compatible server with our backend, in a child process that is watched until it ends."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType
from typing import ClassVar

from . import doctor
from .errors import InvalidArgument, Unsupported

DEFAULT_NAME = "flashmla-default"
# The embedded default is small: eager mode is up sooner than a compilation, and 1 GiB holds 233,000 cached tokens.
DEFAULT_MODEL_ARGUMENTS = ["--max-model-len", "8192", "--enforce-eager"]
KV_CACHE_VARIABLE = "VLLM_CPU_KVCACHE_SPACE"
DEFAULT_MODEL_KV_CACHE_GIB, OTHER_MODEL_KV_CACHE_GIB = 1, 4
LAST_LINES = 20


@dataclass(frozen=True)
class Server:
    """What to start and where it will answer: vLLM's server; for SGLang's see sglang_engine.py."""

    engine: ClassVar[str] = "vLLM"

    model: str  # a folder or a name that the engine resolves
    name: str  # as requests call it
    host: str = "127.0.0.1"
    port: int = 8000
    arguments: list[str] = field(default_factory=list)
    kv_cache_gib: int = OTHER_MODEL_KV_CACHE_GIB
    attention_backend: str = "flashmla"

    @property
    def url(self) -> str:
        """Where a client on this machine reaches it."""
        reachable = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.host, self.host)
        return f"http://[{reachable}]:{self.port}" if ":" in reachable else f"http://{reachable}:{self.port}"

    @property
    def curl(self) -> str:
        """A chat completion to paste into a shell."""
        body = {
            "model": self.name,
            "max_tokens": 48,
            "messages": [{"role": "user", "content": "How are you?"}],
        }
        header, data = shlex.quote("Content-Type: application/json"), shlex.quote(json.dumps(body))
        return f"curl {self.url}/v1/chat/completions -H {header} -d {data}"

    def command(self) -> list[str]:
        """Not the `vllm` command: under vllm-cpu it looks for a distribution named vllm and stops."""
        return [
            *(sys.executable, "-m", "vllm.entrypoints.openai.api_server"),
            *("--model", self.model, "--served-model-name", self.name),
            *("--host", self.host, "--port", str(self.port)),
            *("--attention-backend", self.attention_backend),
            *self.arguments,
        ]

    def environment(self) -> dict[str, str]:
        """The caller's environment; on the CPU with a bound on the KV cache, which would else take most memory."""
        environment = {**os.environ, **doctor.INSTALLED_PACKAGES_ONLY}
        if doctor.vllm_runs_on_cpu():
            environment.setdefault(KV_CACHE_VARIABLE, str(self.kv_cache_gib))
        return environment


def check_port(host: str, port: int) -> None:
    """Raises InvalidArgument unless a server could listen there now."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as refusal:
        raise InvalidArgument(
            f"host {host}, port {port}: {refusal.strerror}; choose others with --host and --port"
        ) from None


def check_vllm() -> None:
    """Raises Unsupported unless a vLLM is installed."""
    if doctor.vllm_distribution() is None:
        raise Unsupported(f"vLLM is not installed: {doctor.INSTALL_VLLM_GPU}; on a CPU: {doctor.INSTALL_VLLM_CPU}")


def run(server: Server, say: Callable[[str], None]) -> int:
    """Runs the server until it ends, its log on our standard output. Returns its exit code, as a shell would.

    say: receives what the user should see: the URL when it answers, the last lines when it dies.
    """
    with subprocess.Popen(
        server.command(),
        env=server.environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,  # Ctrl-C reaches the server once, through us, and not twice
    ) as child:
        log = _Log(f"{server.engine} chose another attention backend than ours: `flashmla doctor` says why")
        copying = threading.Thread(target=log.copy, args=(child,), daemon=True)
        copying.start()
        with _forwarded_signals(child) as stopped_by:
            if _wait_until_healthy(server, child):
                say(f"{server.name} answers at {server.url}\n{log.who_serves}\nTry it:\n{server.curl}")
            code = child.wait()
        copying.join(timeout=10)
        if copying.is_alive():  # a worker outlives the server, and holds the pipe and memory
            os.killpg(child.pid, signal.SIGKILL)
            copying.join()
    if not stopped_by:
        say(f"The server ended by itself with exit code {code}. Its last lines:\n" + "".join(log.last))
        if code == 0:
            return 1  # a server that stops unasked has failed
    return code if code >= 0 else 128 - code


def _wait_until_healthy(server: Server, child: subprocess.Popen[str]) -> bool:
    while child.poll() is None:
        try:
            with urllib.request.urlopen(f"{server.url}/health", timeout=5):
                return True
        except (urllib.error.URLError, OSError):
            time.sleep(0.5)
    return False


@dataclass
class _Log:
    """The server's output: passed on, its last lines kept, and in it the line that says who serves."""

    who_serves: str
    last: deque[str] = field(default_factory=lambda: deque(maxlen=LAST_LINES))

    def copy(self, child: subprocess.Popen[str]) -> None:
        assert child.stdout is not None
        for line in child.stdout:
            sys.stdout.write(line)
            sys.stdout.flush()
            self.last.append(line)
            if found := re.search(r"flashmla_backend \S+ serves MLA decode.*", line):
                self.who_serves = found[0]


@contextmanager
def _forwarded_signals(child: subprocess.Popen[str]) -> Iterator[list[int]]:
    """Passes the signals that end us on to the child: the first politely, the next one ends all its processes."""
    received: list[int] = []

    def forward(number: int, _: FrameType | None) -> None:
        received.append(number)
        if child.poll() is not None:
            return
        if len(received) == 1:
            child.send_signal(number)
        else:
            os.killpg(child.pid, signal.SIGKILL)

    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    previous = {number: signal.signal(number, forward) for number in numbers}
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
