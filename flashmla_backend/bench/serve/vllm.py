"""vLLM in `flashmla bench serve`: its server, and the generator behind `vllm bench serve`."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from flashmla_backend import serve
from flashmla_backend.bench import backends
from flashmla_backend.bench.serve.engine import Engine
from flashmla_backend.bench.serve.loads import Load
from flashmla_backend.bench.serve.measured import METRICS, PERCENTILES, digest
from flashmla_backend.bench.serve.plan import Plan
from flashmla_backend.bench.servers import HttpServer
from flashmla_backend.bench.steps.run import vllm_version
from flashmla_backend.bench.vllm_server import MODEL_NAME, execution, vllm_server

WARM_UPS = 4  # requests before each load


class Vllm(Engine):
    backends = backends.BUILTINS
    on_gpu = "ours,FLASHMLA,FLASH_ATTN_MLA"
    who_serves = re.compile(r"Using \S+ (attention )?backend.*")
    load_module = "flashmla_backend.bench.serve.load"

    def check_installed(self) -> None:
        serve.check_vllm()

    def version(self) -> str:
        return vllm_version()

    def server(self, plan: Plan, folder: Path, backend: str, log: Path) -> HttpServer:
        return vllm_server(folder, backend, arguments(plan), log)

    def load_arguments(self, plan: Plan, load: Load, folder: Path, server: HttpServer, result: Path) -> list[str]:
        return [
            *("--backend", "openai", "--base-url", server.url, "--endpoint", "/v1/completions"),
            *("--model", str(folder), "--served-model-name", MODEL_NAME),
            *("--dataset-name", "random", "--random-range-ratio", f"{plan.spread:g}", "--seed", "0"),
            *("--random-input-len", str(plan.input_tokens), "--random-output-len", str(plan.output_tokens)),
            *("--temperature", "0", "--ignore-eos", "--num-warmups", str(WARM_UPS), "--disable-tqdm"),
            *("--percentile-metrics", ",".join(METRICS), "--metric-percentiles", ",".join(PERCENTILES)),
            *("--save-result", "--result-dir", str(result.parent), "--result-filename", result.name),
            *load.arguments(),
        ]

    def digest(self, result: str) -> dict[str, Any]:
        return digest(json.loads(result))


def arguments(plan: Plan) -> list[str]:
    """Of vLLM's server, the same for every backend."""
    return [
        *("--dtype", plan.dtype, "--max-model-len", str(plan.longest), "--seed", "0"),
        "--no-enable-prefix-caching",  # every backend prefills every prompt
        *execution(plan.compiled),
        *plan.server_arguments,
    ]
