"""A whole run: one backend after the other, each in a process of its own, and if asked for in turns."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from flashmla_backend.bench import backends
from flashmla_backend.bench.child import ask_child
from flashmla_backend.bench.execution import engine_arguments
from flashmla_backend.bench.offline.job import draw_lengths
from flashmla_backend.bench.steps.models import MODELS, write_config
from flashmla_backend.bench.turns import in_turns
from flashmla_backend.errors import InvalidArgument


@dataclass(frozen=True)
class Plan:
    """What to run. Raises InvalidArgument for an unknown model, and for steps too small for a token of each request."""

    model: str
    backends: list[str]
    prompts: int  # of a round
    input_tokens: int
    output_tokens: int
    spread: float  # of both lengths, see draw_lengths
    at_once: int  # requests in a step, at most
    batched_tokens: int | None  # tokens in a step, at most; vLLM's default if None
    rounds: int  # of one process
    turns: int  # processes of each backend
    dtype: str
    compiled: bool  # torch.compile, see engine_arguments
    timeout_s: float  # of one process
    logs: Path

    def __post_init__(self) -> None:
        if self.model not in MODELS:
            raise InvalidArgument(f"model is {self.model!r}; accepted: {', '.join(MODELS)}")
        if self.batched_tokens is not None and self.batched_tokens < self.at_once:
            raise InvalidArgument(
                f"batched-tokens is {self.batched_tokens}; accepted: at least at-once, which is {self.at_once}"
            )

    @cached_property
    def lengths(self) -> list[tuple[int, int]]:
        return draw_lengths(self.prompts, self.input_tokens, self.output_tokens, self.spread)


@dataclass
class Results:
    """backend -> its rounds of all turns, its attention's class, tokens that a step could hold; and what went wrong."""

    rounds: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    impls: dict[str, str] = field(default_factory=dict)
    batched_tokens: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    wall_s: float = 0.0


def run(plan: Plan, report_progress: Callable[[int, int, str], None], keep: Callable[[Results], None]) -> Results:
    """Measure. `report_progress(done, of, what)` is called before each step of it, `keep` after each process with the
    results so far, which outlive a run that is cut short."""
    begin, results = time.monotonic(), Results()
    plan.logs.mkdir(parents=True, exist_ok=True)
    processes = in_turns(plan.backends, plan.turns)
    done, of = 0, len(processes) * (plan.rounds + 3)
    for index, (turn, backend) in enumerate(processes):
        done = index * (plan.rounds + 3)

        def progressed(what: str, who: str = f"{backend}, turn {turn}") -> None:
            nonlocal done
            report_progress(done, of, f"{who}: {what}")
            done += 1

        answer, problem = run_backend(plan, turn, backend, progressed)
        if answer is not None:
            results.impls[backend] = answer["impl"]
            results.batched_tokens[backend] = answer["batched_tokens"]
            if (backend == backends.OURS) == answer["impl"].startswith("flashmla_backend."):
                results.rounds.setdefault(backend, []).extend({"turn": turn, **one} for one in answer["rounds"])
            else:
                problem = problem or f"{answer['impl']} answered"
        if problem:
            results.notes.append(f"{backend}, turn {turn}: {problem}")
        results.wall_s = time.monotonic() - begin
        keep(results)
    return results


def run_backend(
    plan: Plan, turn: int, backend: str, progressed: Callable[[str], None]
) -> tuple[dict[str, Any] | None, str | None]:
    """What the child answered, if anything, and what went wrong, if anything."""
    selected, environment = backends.selection(backend)
    with tempfile.TemporaryDirectory() as folder:
        request = {
            "model": str(write_config(plan.model, plan.dtype, max(map(sum, plan.lengths)), Path(folder))),
            "attention_backend": selected,
            "dtype": plan.dtype,
            "lengths": plan.lengths,
            "at_once": plan.at_once,
            "batched_tokens": plan.batched_tokens,
            "rounds": plan.rounds,
            "engine": engine_arguments(plan.compiled),
        }
        log = plan.logs / f"offline-{backend}-{turn}.log"
        return ask_child("flashmla_backend.bench.offline.child", request, environment, log, plan.timeout_s, progressed)
