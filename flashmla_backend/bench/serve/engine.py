"""What `flashmla bench serve` knows of an engine: its server, and its users' own load generator."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, ClassVar

from flashmla_backend.bench.backends import OURS
from flashmla_backend.bench.serve.loads import Load
from flashmla_backend.bench.serve.plan import Plan
from flashmla_backend.bench.servers import HttpServer, ServerFailed


class Engine(ABC):
    """vLLM or SGLang."""

    backends: ClassVar[tuple[str, ...]]  # its own, as `--attention-backend` takes them
    on_gpu: ClassVar[str]  # backends that are compared by default
    who_serves: ClassVar[re.Pattern[str]]  # what its log says of a backend that is not ours
    load_module: ClassVar[str]  # runs its load generator, see load.py

    @abstractmethod
    def check_installed(self) -> None:
        """Raises Unsupported unless it is there."""

    @abstractmethod
    def version(self) -> str:
        """Name and version of what is installed."""

    @abstractmethod
    def server(self, plan: Plan, folder: Path, backend: str, log: Path) -> HttpServer:
        """A server of the model in `folder` on a free port. backend: "ours" or one of its own."""

    @abstractmethod
    def load_arguments(self, plan: Plan, load: Load, folder: Path, server: HttpServer, result: Path) -> list[str]:
        """Of its load generator, which then writes `result`."""

    @abstractmethod
    def digest(self, result: str) -> dict[str, Any]:
        """What is kept of the file that its load generator wrote, see measured.py."""


OUR_LINE = re.compile(r"flashmla_backend \S+ serves MLA decode.*")


def who_serves(engine: Engine, backend: str, log: Path) -> str:
    """What the server's log says. Raises ServerFailed if our backend was asked for and another serves."""
    text = log.read_text(errors="replace")
    ours, others = OUR_LINE.search(text), engine.who_serves.search(text)
    said = ours or others
    if (backend == OURS) != bool(ours):
        raise ServerFailed(f"asked for {backend}, and the log says: {said[0] if said else 'nothing of it'} ({log})")
    return said[0].strip() if said else "not logged"
