"""Results as JSON and as a table.

A report is a dict: "device", "torch", "vllm", "date", "commit", "command", what was asked for ("model", "dtype",
"prompts", "input_tokens", "output_tokens", "spread", "at_once", "compiled", "turns"), by backend "impls" and the
"batched_tokens" that its steps could hold, "rows", "summary", "notes", "wall_s". Rows are {backend, output_throughput,
total_throughput, steps, ms, rounds}; throughputs are {median, least, most} in tokens a second, `total` with the
prompts' tokens; `steps` of a round and `ms` of a step are medians by kind, see clock.py; rounds are {turn, seconds,
steps}, and there `steps` is {kind: {count, seconds, median_ms}}.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

import torch
from rich.table import Table

from flashmla_backend.bench import machine, tables
from flashmla_backend.bench.backends import OURS
from flashmla_backend.bench.offline.clock import KINDS
from flashmla_backend.bench.offline.run import Plan, Results
from flashmla_backend.bench.provenance import provenance
from flashmla_backend.bench.steps.run import vllm_version

ASKED = ("model", "dtype", "prompts", "input_tokens", "output_tokens", "spread", "at_once", "compiled", "turns")


def make(results: Results, plan: Plan, command: Sequence[str], commit: str | None) -> dict[str, Any]:
    """The report of a run."""
    rows = [row_of(who, rounds, plan.lengths) for who, rounds in results.rounds.items() if rounds]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return {
        **provenance(machine.describe(device)[0], command, commit),
        "vllm": vllm_version(),
        **{name: getattr(plan, name) for name in ASKED},
        "batched_tokens": results.batched_tokens,
        "impls": results.impls,
        "rows": rows,
        "summary": summarise(rows),
        "notes": results.notes,
        "wall_s": round(results.wall_s, 1),
    }


def row_of(backend: str, rounds: Sequence[dict[str, Any]], lengths: Sequence[tuple[int, int]]) -> dict[str, Any]:
    """What a backend's rounds come to."""
    output, total = sum(tokens for _, tokens in lengths), sum(map(sum, lengths))
    times: dict[str, list[float]] = {
        kind: [one["steps"][kind]["median_ms"] for one in rounds if kind in one["steps"]] for kind in KINDS
    }
    return {
        "backend": backend,
        "output_throughput": _spread([output / one["seconds"] for one in rounds]),
        "total_throughput": _spread([total / one["seconds"] for one in rounds]),
        "steps": {
            kind: statistics.median([one["steps"].get(kind, {"count": 0})["count"] for one in rounds]) for kind in KINDS
        },
        "ms": {kind: round(statistics.median(found), 4) for kind, found in times.items() if found},
        "rounds": list(rounds),
    }


def _spread(values: Sequence[float]) -> dict[str, float]:
    found = {"median": statistics.median(values), "least": min(values), "most": max(values)}
    return {name: round(value, 2) for name, value in found.items()}


def summarise(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """How many times better we are than the best of the others: throughput, and a step of each kind but the first."""
    ours = next((row for row in rows if row["backend"] == OURS), None)
    others = [row for row in rows if row["backend"] != OURS]
    if ours is None or not others:
        return {}
    best = max(other["output_throughput"]["median"] for other in others)
    gains = {"throughput": ours["output_throughput"]["median"] / best}
    for kind in ("decode", "mixed"):
        times = [other["ms"][kind] for other in others if kind in other["ms"]]
        if times and kind in ours["ms"]:
            gains[kind] = min(times) / ours["ms"][kind]
    return {name: round(gain, 4) for name, gain in gains.items()}


def cells(report: dict[str, Any]) -> list[list[str]]:
    """A head, then a line for each backend."""
    lines = [["backend", "tokens/s", "least", "most", "with prompts'", "decode steps", "ms", "mixed steps", "ms"]]
    for row in report["rows"]:
        line = [row["backend"], *(f"{row['output_throughput'][which]:.1f}" for which in ("median", "least", "most"))]
        line.append(f"{row['total_throughput']['median']:.1f}")
        for kind in ("decode", "mixed"):
            line += [f"{row['steps'][kind]:g}", f"{row['ms'][kind]:.2f}" if kind in row["ms"] else "-"]
        lines.append(line)
    return lines


def table(report: dict[str, Any]) -> Table:
    title = (
        f"{report['device']}, {report['vllm']}{', compiled' if report['compiled'] else ''}, {report['model']} in "
        f"{report['dtype']}: {report['prompts']} prompts of {report['input_tokens']} and answers of "
        f"{report['output_tokens']} tokens, both +-{report['spread']:.0%}, {report['at_once']} at once"
    )
    return tables.table(cells(report), title)


def markdown(report: dict[str, Any]) -> str:
    """The same table for documents."""
    return tables.markdown(cells(report))


def lines(report: dict[str, Any]) -> list[str]:
    """What the table does not say."""
    words = {
        "throughput": "throughput, ours / best of the others",
        "decode": "time of a decode step, best of the others / ours",
        "mixed": "time of a mixed step, best of the others / ours",
    }
    said = [f"{words[name]}: {x:.3f}" for name, x in report["summary"].items()]
    sizes = report["batched_tokens"]  # vLLM may choose others than it was asked for
    said += [f"{who}: {impl}, up to {sizes[who]} tokens in a step" for who, impl in report["impls"].items()]
    return said + report["notes"]
