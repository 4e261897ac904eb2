"""The engines of `flashmla bench serve`, by name."""

from __future__ import annotations

from flashmla_backend.bench.serve.engine import Engine
from flashmla_backend.bench.serve.sglang import Sglang
from flashmla_backend.bench.serve.vllm import Vllm
from flashmla_backend.errors import InvalidArgument

ENGINES: dict[str, Engine] = {"vllm": Vllm(), "sglang": Sglang()}


def engine_named(name: str) -> Engine:
    """Raises InvalidArgument for a name that is not known."""
    if name not in ENGINES:
        raise InvalidArgument(f"engine is {name!r}; accepted: {', '.join(ENGINES)}")
    return ENGINES[name]
