"""Results as JSON and as a table.

A report is a dict: "device", "torch", "engine", "date", "commit", "command", "model", "dtype", "input_tokens",
"output_tokens", "spread", "served_by", "rows", "summary", "notes", "wall_s"; rows are {load, kind, value, prompts,
<backend>: {completed, duration, *_throughput, ttft_ms, tpot_ms, itl_ms, e2el_ms}}, each *_ms {mean, p50, p90, p99}.
Where several turns were asked for, these are medians, and <backend> also has "turns": [{turn, completed, ...}].
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from rich.table import Table

from flashmla_backend.bench import machine
from flashmla_backend.bench.backends import OURS
from flashmla_backend.bench.provenance import provenance
from flashmla_backend.bench.serve.engine import Engine
from flashmla_backend.bench.serve.measured import medians
from flashmla_backend.bench.serve.plan import Plan
from flashmla_backend.bench.serve.run import Results


def make(results: Results, engine: Engine, plan: Plan, command: Sequence[str], commit: str | None) -> dict[str, Any]:
    """The report of a run."""
    rows = []
    for load in plan.loads:
        row: dict[str, Any] = {"load": load.name, "kind": load.kind, "value": load.value, "prompts": load.prompts}
        row |= {
            who: together(measured[load.name], plan.turns)
            for who, measured in results.measured.items()
            if load.name in measured
        }
        rows.append(row)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return {
        **provenance(machine.describe(device)[0], command, commit),
        "engine": engine.version(),
        "model": plan.model,
        "dtype": plan.dtype,
        "input_tokens": plan.input_tokens,
        "output_tokens": plan.output_tokens,
        "spread": plan.spread,
        "served_by": results.served_by,
        "rows": rows,
        "summary": summarise(rows),
        "notes": results.notes,
        "wall_s": round(results.wall_s, 1),
    }


def together(measured: Mapping[int, dict[str, Any]], turns: int) -> dict[str, Any]:
    """Medians of what was measured, turn by turn; if several turns were asked for, also what each measured."""
    found = medians(list(measured.values()))
    return found if turns == 1 else found | {"turns": [{"turn": turn, **one} for turn, one in measured.items()]}


def backends_of(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Names in the order of their first appearance."""
    return list(dict.fromkeys(key for row in rows for key, value in row.items() if isinstance(value, dict)))


def gains(row: dict[str, Any]) -> dict[str, float]:
    """How many times better we are than the best of the others: time per token, time to the first, throughput."""
    others = [value for who, value in row.items() if isinstance(value, dict) and who != OURS]
    if OURS not in row or not others:
        return {}
    ours = row[OURS]
    return {
        "tpot": min(other["tpot_ms"]["p50"] for other in others) / ours["tpot_ms"]["p50"],
        "ttft": min(other["ttft_ms"]["p50"] for other in others) / ours["ttft_ms"]["p50"],
        "throughput": ours["output_throughput"] / max(other["output_throughput"] for other in others),
    }


def summarise(rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Geometric mean and least of each gain over all loads."""
    gained = [found for row in rows if (found := gains(row))]
    summary = {}
    for name in gained[0] if gained else ():
        ratios = [found[name] for found in gained]
        mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
        summary[name] = {"geomean": round(mean, 4), "min": round(min(ratios), 4), "n": len(ratios)}
    return summary


def table(report: dict[str, Any]) -> Table:
    """A line for each load and backend."""
    title = (
        f"{report['device']}, {report['engine']}, {report['model']} in {report['dtype']}, prompts of "
        f"{report['input_tokens']} and answers of {report['output_tokens']} tokens"
    )
    heads = ("load", "backend", "first token, ms: p50", "p99", "per token, ms: p50", "p99", "tokens/s", "requests/s")
    made = Table(*heads, title=title)
    for row in report["rows"]:
        for who in backends_of([row]):
            value = row[who]
            made.add_row(
                *(row["load"], who),
                *(f"{value[metric][p]:.2f}" for metric in ("ttft_ms", "tpot_ms") for p in ("p50", "p99")),
                *(f"{value['output_throughput']:.1f}", f"{value['request_throughput']:.2f}"),
            )
    return made


def lines(report: dict[str, Any]) -> list[str]:
    """What the table does not say."""
    words = {
        "tpot": "time per token, best of the others / ours",
        "ttft": "time to the first token, best of the others / ours",
        "throughput": "throughput, ours / best of the others",
    }
    said = [
        f"{words[name]}: geometric mean {s['geomean']:.3f}, least {s['min']:.3f}"
        for name, s in report["summary"].items()
    ]
    measured = [row[who] for row in report["rows"] for who in backends_of([row])]
    if turns := sorted({len(one["turns"]) for one in measured if "turns" in one}):  # fewer where some failed
        said.insert(0, f"turns of a backend, whose medians these are: {' or '.join(map(str, turns))}")
    return said + [f"{who}: {line}" for who, line in report["served_by"].items()] + report["notes"]
