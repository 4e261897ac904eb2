"""vLLM's server with a backend of choice."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from flashmla_backend import serve
from flashmla_backend.bench import backends
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
    """Full CUDA graphs of decode, torch.compile only if `compiled`: it starts slower. On the CPU, eager."""
    if not torch.cuda.is_available():
        # vLLM's CPU rotary op rotates MLA's q_pe wrongly; our platform switches it off, the stock one must be told.
        return ["--enforce-eager", "--compilation-config", json.dumps({"custom_ops": ["-rotary_embedding"]})]
    graphs = {"cudagraph_mode": "FULL_DECODE_ONLY"}
    return ["--compilation-config", json.dumps(graphs if compiled else {"mode": 0, **graphs})]
