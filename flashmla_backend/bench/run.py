"""A whole run: the machine, correctness, then every shape with every contender, until the budget is spent."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from flashmla_backend.bench import machine, timing
from flashmla_backend.bench.check import check_all
from flashmla_backend.bench.contenders import Contender, load
from flashmla_backend.bench.machine import Machine
from flashmla_backend.bench.problems import Problem, Shape, make_pool, make_problem

MAX_FAILURES = 3  # of one contender, after which it is not tried again
CHECK_PAGES = 80  # the pool must hold the problems of the correctness check
RESERVE_SECONDS = 5  # for the report
TURNS, TURN_MS = 2, 20  # contenders take turns, and the better median of each counts


@dataclass
class Results:
    """What a run found. `rows` and `check` are in the format that `report` writes."""

    machine: Machine
    contenders: list[Contender]
    rows: list[dict[str, Any]] = field(default_factory=list)
    check: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    wall_s: float = 0.0

    def wrong(self) -> set[str]:
        """Contenders that failed a check."""
        return {c.name for c in self.contenders for record in self.check if not record[c.name]["right"]}


def run(
    shapes: Sequence[Shape],
    impls: Sequence[str],
    device: torch.device,
    budget_s: float,
    report_progress: Callable[[int, int, str], None],
    spread: float = 1.0,
) -> Results:
    """Measure; `spread` as of `make_problem`. `report_progress(done, of, what)` is called before each step."""
    begin = time.monotonic()
    steps = len(shapes) + 2
    report_progress(0, steps, "loading")
    contenders, missing = load(impls, device)
    report_progress(0, steps, "the machine's own rates")
    results = Results(machine.measure(device), contenders, notes=[f"{n} left out: {why}" for n, why in missing.items()])
    l2_bytes = results.machine.l2_bytes
    pool = make_pool([*shapes, Shape(1, 1, CHECK_PAGES, 64, "fixed")], l2_bytes, device)

    report_progress(1, steps, "correctness")
    for heads, s_q in sorted({(shape.heads, shape.s_q) for shape in shapes}):
        results.check += check_all(contenders, pool, heads, s_q, spread)
    if wrong := results.wrong():
        results.notes.append(f"not timed, for wrong answers or errors in the check: {', '.join(sorted(wrong))}")
    able = {contender.name: contender for contender in contenders if contender.name not in wrong}

    failures = dict.fromkeys(able, 0)
    for index, shape in enumerate(shapes):
        if time.monotonic() - begin > budget_s - RESERVE_SECONDS:
            results.notes.append(f"budget of {budget_s:.0f} s: {len(shapes) - index} of {len(shapes)} shapes not run")
            break
        report_progress(index + 2, steps, describe(shape))
        rotations = shape.rotations(results.machine.l2_bytes)
        problem = make_problem(pool, shape.lengths(), shape.heads, shape.s_q, rotations, index, spread)
        row = new_row(shape, problem, results.machine)
        watches: dict[str, timing.Stopwatch] = {}
        measured: dict[str, timing.Timing] = {}
        for turn in range(TURNS):
            for name, contender in able.items():
                if failures[name] >= MAX_FAILURES or (turn > 0 and name not in measured):
                    continue
                try:
                    if turn == 0:
                        watches[name] = timing.Stopwatch(contender.prepare(problem), device)
                    taken = watches[name].measure(TURN_MS)
                    measured[name] = min(taken, measured.get(name, taken))
                except Exception as error:  # out of memory, a shape a rival refuses
                    failures[name] += 1
                    message = str(error).partition("\n")[0][:200]
                    results.notes.append(f"{name}, {describe(shape)}: {type(error).__name__}: {message}")
        row.update({name: figures(best, problem) for name, best in measured.items()})
        rivals = [row[c.name]["us"] for c in able.values() if c.is_rival and c.name in row]
        if rivals:
            row["best_rival_us"] = min(rivals)
        results.rows.append(row)
    report_progress(steps, steps, "done")
    results.wall_s = time.monotonic() - begin
    return results


def describe(shape: Shape) -> str:
    return f"{shape.heads} heads, s_q {shape.s_q}, batch {shape.batch}, {shape.length} tokens, {shape.kind}"


def new_row(shape: Shape, problem: Problem, machine: Machine) -> dict[str, Any]:
    names = {"heads": "h", "s_q": "s", "batch": "b", "length": "len", "kind": "kind"}
    return {
        **{names[key]: value for key, value in asdict(shape).items()},
        "sum": sum(problem.lengths),
        "max": max(problem.lengths),
        "R": problem.rotations,
        "flops": problem.flops,
        "bytes": problem.bytes,
        "ideal_us": round(machine.ideal_us(problem), 2),
    }


def figures(measured: timing.Timing, problem: Problem) -> dict[str, float]:
    return {
        "us": round(measured.median_us, 2),
        "min_us": round(measured.least_us, 2),
        "tflops": round(problem.flops / measured.median_us / 1e6, 3),
        "gbs": round(problem.bytes / measured.median_us / 1e3, 2),
    }
