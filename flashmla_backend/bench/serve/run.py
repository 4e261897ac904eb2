"""A whole run: for every backend a server, and on it one load after the other."""

from __future__ import annotations

import json
import re
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flashmla_backend.bench.backends import OURS
from flashmla_backend.bench.child import last_lines, run_child
from flashmla_backend.bench.serve.loads import Load
from flashmla_backend.bench.serve.models import resolve
from flashmla_backend.bench.servers import HttpServer, ServerFailed, running
from flashmla_backend.bench.vllm_server import MODEL_NAME, execution, vllm_server

WARM_UPS = 4  # requests before each load
METRICS = ("ttft", "tpot", "itl", "e2el")  # vLLM's names: first token, per further token, between tokens, end to end
PERCENTILES = ("50", "90", "99")
WHO_SERVES = re.compile(r"flashmla_backend \S+ serves MLA decode.*|Using \S+ (attention )?backend.*")


@dataclass(frozen=True)
class Plan:
    """What to run."""

    model: str
    backends: list[str]
    loads: list[Load]
    dtype: str
    input_tokens: int
    output_tokens: int
    spread: float  # of both lengths, as a part of them: 0.5 draws from half to one and a half
    compiled: bool
    timeout_s: float  # of one backend
    logs: Path
    server_arguments: list[str]

    @property
    def longest(self) -> int:
        """Tokens of prompt and answer, with room for prompts that grow a little when they are tokenized anew."""
        return int((self.input_tokens + self.output_tokens) * (1 + self.spread) * 1.25) + 64


@dataclass
class Results:
    """backend -> name of a load -> what was measured; who served each backend; and what went wrong."""

    measured: dict[str, dict[str, dict[str, Any]]] = field(default_factory=dict)
    served_by: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    wall_s: float = 0.0


def run(plan: Plan, report_progress: Callable[[int, int, str], None]) -> Results:
    """Measure. `report_progress(done, of, what)` is called before each step of it."""
    begin, results = time.monotonic(), Results()
    per_backend = len(plan.loads) + 1
    with tempfile.TemporaryDirectory() as scratch:
        folder, model_arguments = resolve(plan.model, plan.dtype, plan.longest, Path(scratch))
        for index, backend in enumerate(plan.backends):
            done = index * per_backend

            def progressed(what: str, backend: str = backend) -> None:
                nonlocal done
                report_progress(done, len(plan.backends) * per_backend, f"{backend}: {what}")
                done += 1

            progressed("starting")
            log = plan.logs / f"serve-{backend}.log"
            server = vllm_server(folder, backend, [*model_arguments, *arguments(plan)], log)
            deadline = time.monotonic() + plan.timeout_s
            try:
                with running(server, plan.timeout_s):
                    results.served_by[backend] = who_serves(backend, log)
                    results.measured[backend] = _load(plan, backend, folder, server, deadline, progressed, results)
            except ServerFailed as failure:
                results.notes.append(f"{backend}: {failure}")
    results.wall_s = time.monotonic() - begin
    return results


def arguments(plan: Plan) -> list[str]:
    """Of vLLM's server, the same for every backend."""
    return [
        *("--dtype", plan.dtype, "--max-model-len", str(plan.longest), "--seed", "0"),
        "--no-enable-prefix-caching",  # every backend prefills every prompt
        *execution(plan.compiled),
        *plan.server_arguments,
    ]


def who_serves(backend: str, log: Path) -> str:
    """What the server's log says. Raises ServerFailed if our backend was asked for and another serves."""
    found = [match[0].strip() for match in WHO_SERVES.finditer(log.read_text(errors="replace"))]
    said = max(found, key=lambda line: line.startswith("flashmla_backend"), default="not logged")
    if (backend == OURS) != said.startswith("flashmla_backend"):
        raise ServerFailed(f"asked for {backend}, and the log says: {said} ({log})")
    return said


def _load(
    plan: Plan,
    backend: str,
    folder: Path,
    server: HttpServer,
    deadline: float,
    progressed: Callable[[str], None],
    results: Results,
) -> dict[str, dict[str, Any]]:
    """What vLLM's generator measured, load by load; a note in `results` if it stopped."""
    with tempfile.TemporaryDirectory() as scratch:
        files = {load.name: Path(scratch) / f"{number}.json" for number, load in enumerate(plan.loads)}
        asked = {load.name: generator_arguments(plan, load, folder, server, files[load.name]) for load in plan.loads}
        path = Path(scratch) / "loads.json"
        path.write_text(json.dumps(asked))
        log_path = plan.logs / f"load-{backend}.log"
        left = max(1.0, deadline - time.monotonic())
        code = run_child(["flashmla_backend.bench.serve.load", str(path)], {}, log_path, left, progressed)
        if code:
            results.notes.append(f"{backend}: the load ended with code {code} ({log_path}):\n{last_lines(log_path)}")
        measured = {name: digest(json.loads(file.read_text())) for name, file in files.items() if file.exists()}
    for load in plan.loads:
        if (row := measured.get(load.name)) and row["completed"] != load.prompts:
            results.notes.append(f"{backend}, {load.name}: {row['completed']} of {load.prompts} requests completed")
    return measured


def generator_arguments(plan: Plan, load: Load, folder: Path, server: HttpServer, result: Path) -> list[str]:
    """Of `vllm bench serve`."""
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


def digest(result: dict[str, Any]) -> dict[str, Any]:
    """What is kept of a result of `vllm bench serve`; times in milliseconds, throughputs per second."""
    kept = {key: result[key] for key in ("completed", "total_input_tokens", "total_output_tokens")}
    for key in ("duration", "request_throughput", "output_throughput", "total_token_throughput"):
        kept[key] = round(result[key], 4)
    for metric in METRICS:
        kept[f"{metric}_ms"] = {
            "mean": round(result[f"mean_{metric}_ms"], 3),
            **{f"p{which}": round(result[f"p{which}_{metric}_ms"], 3) for which in PERCENTILES},
        }
    return kept
