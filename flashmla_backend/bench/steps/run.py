"""A whole run: every model with every backend, each in a process of its own."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flashmla_backend import doctor
from flashmla_backend.bench import backends
from flashmla_backend.bench.child import ask_child
from flashmla_backend.bench.execution import engine_arguments
from flashmla_backend.bench.steps.child import COMPARED_TOKENS
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
    compared: int  # requests whose answers are
    new_tokens: int  # of each of them
    timeout_s: float  # of one process
    compiled: bool  # torch.compile, see engine_arguments
    logs: Path


@dataclass
class Results:
    """model -> backend -> what the child answered; and what went wrong."""

    answers: dict[str, dict[str, dict[str, Any]]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    wall_s: float = 0.0


def run(plan: Plan, report_progress: Callable[[int, int, str], None], keep: Callable[[Results], None]) -> Results:
    """Measure. `report_progress(done, of, what)` is called before each step of it, `keep` after each process with the
    results so far, which outlive a run that is cut short."""
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
        keep(results)
    return results


def run_backend(
    plan: Plan, model: str, backend: str, progressed: Callable[[str], None]
) -> tuple[dict[str, Any] | None, str | None]:
    """What the child answered, if anything, and what went wrong, if anything."""
    selected, environment = backends.selection(backend)
    with tempfile.TemporaryDirectory() as folder:
        longest = max([COMPARED_TOKENS + plan.new_tokens, *(max(point.lengths) for point in plan.points)])
        request = {
            "model": str(write_config(model, plan.dtype, 2 * longest, Path(folder))),
            "attention_backend": selected,
            "dtype": plan.dtype,
            "points": {point.name: point.lengths for point in plan.points},
            "warmup": plan.warmup,
            "windows": plan.windows,
            "window": plan.window,
            "compared": plan.compared,
            "new_tokens": plan.new_tokens,
            "engine": engine_arguments(plan.compiled, [len(point.lengths) for point in plan.points] or [plan.compared]),
        }
        log = plan.logs / f"{model}-{backend}.log"
        return ask_child("flashmla_backend.bench.steps.child", request, environment, log, plan.timeout_s, progressed)


def vllm_version() -> str:
    """Name and version of the installed vLLM."""
    found = doctor.vllm_distribution()
    return " ".join(found) if found else "none"
