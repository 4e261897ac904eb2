"""A whole run: every model with every backend, each in a process of its own."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from flashmla_backend import doctor
from flashmla_backend.bench import backends
from flashmla_backend.bench.child import last_lines, run_child
from flashmla_backend.bench.steps.models import write_config
from flashmla_backend.bench.steps.points import Point


@dataclass(frozen=True)
class Plan:
    """What to run."""

    models: list[str]
    backends: list[str]
    points: list[Point]
    dtype: str
    warmup: int  # steps
    windows: int
    window: int  # steps
    new_tokens: int  # of the comparison of answers
    timeout_s: float  # of one process
    compiled: bool  # torch.compile, as vLLM's default; without it a start takes half a minute less
    logs: Path


@dataclass
class Results:
    """model -> backend -> what the child answered; and what went wrong."""

    answers: dict[str, dict[str, dict[str, Any]]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    wall_s: float = 0.0


def run(plan: Plan, report_progress: Callable[[int, int, str], None]) -> Results:
    """Measure. `report_progress(done, of, what)` is called before each step of it."""
    begin = time.monotonic()
    results = Results()
    plan.logs.mkdir(parents=True, exist_ok=True)
    pairs = [(model, backend) for model in plan.models for backend in plan.backends]
    per_child = len(plan.points) + 3
    for index, (model, backend) in enumerate(pairs):
        seen = 0

        def progressed(what: str, index: int = index, who: str = f"{model}, {backend}") -> None:
            nonlocal seen
            report_progress(index * per_child + seen, len(pairs) * per_child, f"{who}: {what}")
            seen += 1

        answer, problem = run_backend(plan, model, backend, progressed)
        if problem:
            results.notes.append(f"{model}, {backend}: {problem}")
        if answer is not None:
            results.answers.setdefault(model, {})[backend] = answer
    results.wall_s = time.monotonic() - begin
    return results


def run_backend(
    plan: Plan, model: str, backend: str, progressed: Callable[[str], None]
) -> tuple[dict[str, Any] | None, str | None]:
    """What the child answered, if anything, and what went wrong, if anything."""
    selected, environment = backends.selection(backend)
    log_path = plan.logs / f"{model}-{backend}.log"
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        longest = max(max(point.lengths) for point in plan.points)
        request = {
            "model": str(write_config(model, plan.dtype, 2 * longest, folder / "model")),
            "attention_backend": selected,
            "dtype": plan.dtype,
            "points": {point.name: point.lengths for point in plan.points},
            "warmup": plan.warmup,
            "windows": plan.windows,
            "window": plan.window,
            "new_tokens": plan.new_tokens,
            "engine": engine_arguments(plan),
        }
        request_path, answer_path = folder / "request.json", folder / "answer.json"
        request_path.write_text(json.dumps(request))
        arguments = ["flashmla_backend.bench.steps.child", str(request_path), str(answer_path)]
        code = run_child(arguments, environment, log_path, plan.timeout_s, progressed)
        answer = json.loads(answer_path.read_text()) if answer_path.exists() else None
    if code == 0:
        return answer, None
    return answer, f"ended with code {code} ({log_path}):\n{last_lines(log_path)}"


def engine_arguments(plan: Plan) -> dict[str, Any]:
    """Arguments of vllm.LLM: full CUDA graphs of the batches measured; on the CPU, where there are none, eager."""
    if not torch.cuda.is_available():
        # vLLM's CPU rotary op rotates MLA's q_pe wrongly; our platform switches it off, the stock one must be told.
        return {"enforce_eager": True, "compilation_config": {"custom_ops": ["-rotary_embedding"]}}
    sizes = sorted({len(point.lengths) for point in plan.points})
    graphs = {"cudagraph_mode": "FULL_DECODE_ONLY", "cudagraph_capture_sizes": sizes}
    return {"compilation_config": graphs if plan.compiled else {"mode": 0, **graphs}}


def vllm_version() -> str:
    """Name and version of the installed vLLM."""
    found = doctor.vllm_distribution()
    return " ".join(found) if found else "none"
