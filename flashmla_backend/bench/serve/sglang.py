"""SGLang in `flashmla bench serve`: its server, and its own generator, `sglang.benchmark.serving`."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from flashmla_backend import sglang_engine
from flashmla_backend.bench.backends import OURS
from flashmla_backend.bench.serve.engine import Engine
from flashmla_backend.bench.serve.loads import Load
from flashmla_backend.bench.serve.measured import digest
from flashmla_backend.bench.serve.plan import Plan
from flashmla_backend.bench.servers import HttpServer, free_port
from flashmla_backend.integration.claim import DISABLE_VARIABLE

WARM_UPS = 4  # requests before each load


class Sglang(Engine):
    backends = ("flashmla", "triton", "fa3", "flashinfer", "torch_native")
    on_gpu = "ours,triton"  # its flashmla needs FlashInfer for prompts
    who_serves = re.compile(r"(?<!_)attention_backend'?(=|: )'\w+'")
    load_module = "flashmla_backend.bench.serve.sglang_load"

    def check_installed(self) -> None:
        sglang_engine.check_installed()

    def version(self) -> str:
        return f"sglang {sglang_engine.distribution()}"

    def server(self, plan: Plan, folder: Path, backend: str, log: Path) -> HttpServer:
        ours = backend == OURS
        server = sglang_engine.SglangServer(
            str(folder),
            "measured",
            port=free_port(),
            arguments=arguments(plan, folder),
            attention_backend="flashmla" if ours else backend,
        )
        environment = {**server.environment(), DISABLE_VARIABLE: "0" if ours else "1"}
        return HttpServer(server.command(), environment, server.url, log)

    def load_arguments(self, plan: Plan, load: Load, folder: Path, server: HttpServer, result: Path) -> list[str]:
        # It draws lengths from a part of the longest to the longest, and needs no data set for random token ids.
        longest, part = 1 + plan.spread, (1 - plan.spread) / (1 + plan.spread)
        return [
            *("--backend", "sglang", "--base-url", server.url, "--model", str(folder)),
            *("--dataset-name", "random-ids", "--tokenize-prompt", "--random-range-ratio", f"{part:g}", "--seed", "0"),
            *("--random-input-len", str(round(plan.input_tokens * longest))),
            *("--random-output-len", str(round(plan.output_tokens * longest))),
            *("--warmup-requests", str(WARM_UPS), "--disable-tqdm", "--output-file", str(result)),
            *load.arguments(),
        ]

    def digest(self, result: str) -> dict[str, Any]:
        found = json.loads(result)
        renamed = {key.replace("median_", "p50_").replace("e2e_latency", "e2el"): value for key, value in found.items()}
        return digest(renamed | {"total_token_throughput": found["total_throughput"]})


def arguments(plan: Plan, folder: Path) -> list[str]:
    """Of SGLang's server, the same for every backend."""
    made = [
        *("--dtype", plan.dtype, "--context-length", str(plan.longest), "--random-seed", "0"),
        "--disable-radix-cache",  # every backend prefills every prompt
        *(["--enable-torch-compile"] if plan.compiled else []),
    ]
    if sglang_engine.runs_on_cpu():
        made += ["--max-total-tokens", "131072", "--max-running-requests", "64"]
        if json.loads((folder / "config.json").read_text()).get("rope_scaling") is None:
            made += ["--json-model-override-args", json.dumps(sglang_engine.IDLE_YARN)]
    return [*made, *plan.server_arguments]
