"""Results as JSON, as a table, and in one line per contender.

A report is a dict: "device", "sms", "l2", "torch", "copy_GBs", "read_reduce_GBs", "mm8192_TFLOPs", "date", "commit",
"command", "check", "notes", "summary", and "rows", each {h, s, b, len, kind, sum, max, R, flops, bytes, ideal_us,
best_rival_us, <contender>: {us, min_us, tflops, gbs}}.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from rich.table import Table

from flashmla_backend.bench.contenders import INVARIANT, OURS
from flashmla_backend.bench.provenance import provenance
from flashmla_backend.bench.run import Results

SLOWER = 0.98  # below this a speed-up counts as a loss


def make(results: Results, command: Sequence[str], commit: str | None) -> dict[str, Any]:
    """The report of a run."""
    machine = results.machine
    return {
        **provenance(machine.name, command, commit),
        "sms": machine.sms,
        "l2": machine.l2_bytes,
        "copy_GBs": round(machine.copy_gbs, 2),
        "read_reduce_GBs": round(machine.read_gbs, 2),
        "mm8192_TFLOPs": round(machine.matmul_tflops, 3),
        "check": results.check,
        "rows": results.rows,
        "notes": results.notes,
        "summary": summarise(results.rows),
        "wall_s": round(results.wall_s, 1),
    }


def contenders_of(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Names in the order of their first appearance."""
    return list(dict.fromkeys(key for row in rows for key, value in row.items() if isinstance(value, dict)))


def rivals_best(row: dict[str, Any]) -> float | None:
    """The best rival's time, or without rivals the best time of anyone but us."""
    others = [value["us"] for key, value in row.items() if isinstance(value, dict) and key not in (OURS, INVARIANT)]
    return row.get("best_rival_us") or min(others, default=None)


def speed_ups(rows: Sequence[dict[str, Any]]) -> list[tuple[dict[str, Any], float]]:
    """Rows in which we have something to compare with, and how many times faster we are."""
    return [(row, best / row[OURS]["us"]) for row in rows if OURS in row and (best := rivals_best(row)) is not None]


def summarise(rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """For us: geometric mean and least of best-of-the-others / ours, and in how many shapes we lose."""
    ratios = [ratio for _, ratio in speed_ups(rows)]
    if not ratios:
        return {}
    mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
    losing = sum(ratio < SLOWER for ratio in ratios)
    return {OURS: {"geomean": round(mean, 4), "min": round(min(ratios), 4), "n": len(ratios), "losing": losing}}


def invariance_line(report: dict[str, Any]) -> str:
    """What batch-invariant mode costs."""

    def mean(single: bool) -> float:
        rows = [row for row in report["rows"] if INVARIANT in row and (row["b"] == 1) == single]
        return math.exp(sum(math.log(row[INVARIANT]["us"] / row[OURS]["us"]) for row in rows) / len(rows))

    return f"batch-invariant / free: geometric mean {mean(True):.2f} for one request, {mean(False):.2f} for more"


def table(report: dict[str, Any]) -> Table:
    """Microseconds of each contender, and ours against the ideal and against the best of the others."""
    rows, names = report["rows"], contenders_of(report["rows"])
    title = (
        f"{report['device']}: reads {report['read_reduce_GBs']:.0f} GB/s, multiplies bf16 at "
        f"{report['mm8192_TFLOPs']:.3g} TFLOP/s; microseconds of a call"
    )
    made = Table(
        *("heads", "s_q", "batch", "tokens", "lengths", "ideal", *names, "ours/ideal", "speed-up"), title=title
    )
    ratios = {id(row): ratio for row, ratio in speed_ups(rows)}
    for row in sorted(rows, key=lambda r: (r["h"], r["s"], r["kind"], r["b"], r["len"])):
        cells = [str(row[key]) for key in ("h", "s", "b", "len", "kind")]
        cells += [f"{row['ideal_us']:.1f}", *(f"{row[name]['us']:.1f}" if name in row else "-" for name in names)]
        cells.append(f"{row[OURS]['us'] / row['ideal_us']:.2f}" if OURS in row and row["ideal_us"] else "-")
        cells.append(f"{ratios[id(row)]:.2f}" if id(row) in ratios else "-")
        made.add_row(*cells)
    return made


def summary_line(report: dict[str, Any]) -> str:
    summary = report["summary"].get(OURS)
    if not summary:
        return "nothing to compare with"
    against = "best rival" if any("best_rival_us" in row for row in report["rows"]) else "best of the others"
    behind = sum(ratio < 1 for _, ratio in speed_ups(report["rows"]))
    return (
        f"{against} / ours: geometric mean {summary['geomean']:.3f}, least {summary['min']:.3f}; of "
        f"{summary['n']:.0f} shapes {behind} below 1, {summary['losing']:.0f} of them below {SLOWER}"
    )
