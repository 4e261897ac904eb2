"""vLLM's server with a backend of choice."""

from __future__ import annotations

import json
from pathlib import Path

from flashmla_backend import serve
from flashmla_backend.bench import backends
from flashmla_backend.bench.execution import engine_arguments
from flashmla_backend.bench.servers import HttpServer, free_port

MODEL_NAME = "measured"  # as requests call it


def vllm_server(model: Path, backend: str, arguments: list[str], log: Path) -> HttpServer:
    """A server of `model` on a free port. backend: "ours" or one of vLLM's, see backends.parse."""
    selected, environment = backends.selection(backend)
    server = serve.Server(
        str(model),
        MODEL_NAME,
        port=free_port(),
        arguments=arguments,
        kv_cache_gib=serve.DEFAULT_MODEL_KV_CACHE_GIB,
        attention_backend=selected,
    )
    return HttpServer(server.command(), {**server.environment(), **environment}, server.url, log)


def execution(compiled: bool = False) -> list[str]:
    """The engine's arguments, see engine_arguments, as the server takes them."""
    arguments = engine_arguments(compiled)
    eager = ["--enforce-eager"] if arguments.get("enforce_eager") else []
    return [*eager, "--compilation-config", json.dumps(arguments["compilation_config"])]
