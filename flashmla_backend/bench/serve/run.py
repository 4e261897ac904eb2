"""A whole run: for every backend a server, or in turns several, and on each one load after the other."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from flashmla_backend.bench.child import last_lines, run_child
from flashmla_backend.bench.serve.engine import Engine, who_serves
from flashmla_backend.bench.serve.models import resolve
from flashmla_backend.bench.serve.plan import Plan
from flashmla_backend.bench.servers import HttpServer, ServerFailed, running
from flashmla_backend.bench.turns import in_turns


@dataclass
class Results:
    """backend -> name of a load -> turn -> what was measured; who served each backend; and what went wrong."""

    measured: dict[str, dict[str, dict[int, dict[str, Any]]]] = field(default_factory=dict)
    served_by: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    wall_s: float = 0.0


def run(
    engine: Engine, plan: Plan, report_progress: Callable[[int, int, str], None], keep: Callable[[Results], None]
) -> Results:
    """Measure. `report_progress(done, of, what)` is called before each step of it, `keep` after each server with the
    results so far, which outlive a run that is cut short."""
    begin, results = time.monotonic(), Results()
    servers, per_server = in_turns(plan.backends, plan.turns), len(plan.loads) + 1
    with tempfile.TemporaryDirectory() as scratch:
        folder, model_arguments = resolve(plan.model, plan.dtype, plan.longest, Path(scratch))
        plan = replace(plan, server_arguments=[*model_arguments, *plan.server_arguments])
        for index, (turn, backend) in enumerate(servers):
            done = index * per_server
            who = backend if plan.turns == 1 else f"{backend}, turn {turn}"

            def progressed(what: str, who: str = who) -> None:
                nonlocal done
                report_progress(done, len(servers) * per_server, f"{who}: {what}")
                done += 1

            progressed("starting")
            log = plan.logs / f"serve-{backend}-{turn}.log"
            load_log = plan.logs / f"load-{backend}-{turn}.log"
            server = engine.server(plan, folder, backend, log)
            deadline = time.monotonic() + plan.timeout_s
            try:
                with running(server, plan.timeout_s):
                    results.served_by[backend] = who_serves(engine, backend, log)
                    measured = _load(engine, plan, who, folder, server, load_log, deadline, progressed, results.notes)
                for load, one in measured.items():
                    results.measured.setdefault(backend, {}).setdefault(load, {})[turn] = one
            except ServerFailed as failure:
                results.notes.append(f"{who}: {failure}")
            results.wall_s = time.monotonic() - begin
            keep(results)
    return results


def _load(
    engine: Engine,
    plan: Plan,
    who: str,
    folder: Path,
    server: HttpServer,
    log: Path,
    deadline: float,
    progressed: Callable[[str], None],
    notes: list[str],
) -> dict[str, dict[str, Any]]:
    """What the engine's generator measured, load by load; one more of `notes` if it stopped."""
    with tempfile.TemporaryDirectory() as scratch:
        files = {load.name: Path(scratch) / f"{number}.json" for number, load in enumerate(plan.loads)}
        asked = {load.name: engine.load_arguments(plan, load, folder, server, files[load.name]) for load in plan.loads}
        path = Path(scratch) / "loads.json"
        path.write_text(json.dumps(asked))
        left = max(1.0, deadline - time.monotonic())
        code = run_child([engine.load_module, str(path)], {}, log, left, progressed)
        if code:
            notes.append(f"{who}: the load ended with code {code} ({log}):\n{last_lines(log)}")
        measured = {name: engine.digest(file.read_text()) for name, file in files.items() if file.exists()}
    for load in plan.loads:
        if (row := measured.get(load.name)) and row["completed"] != load.prompts:
            notes.append(f"{who}, {load.name}: {row['completed']} of {load.prompts} requests completed")
    return measured
