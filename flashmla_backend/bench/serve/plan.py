"""What `flashmla bench serve` is to run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from flashmla_backend.bench.serve.loads import Load


@dataclass(frozen=True)
class Plan:
    """Every server serves the model with one backend and answers all loads."""

    model: str
    backends: list[str]
    loads: list[Load]
    turns: int  # servers of each backend
    dtype: str
    input_tokens: int
    output_tokens: int
    spread: float  # of both lengths, as a part of them: 0.5 draws from half to one and a half
    compiled: bool
    timeout_s: float  # of one server
    logs: Path
    server_arguments: list[str]

    @property
    def longest(self) -> int:
        """Tokens of prompt and answer, with room for prompts that grow a little when they are tokenized anew."""
        return int((self.input_tokens + self.output_tokens) * (1 + self.spread) * 1.25) + 64
