"""The reports that docs/performance.md is made from: the newest of each kind under benchmarks/results.

Of every kernel report that the document was ever made from, kernels-history-DEVICE.json keeps our time and the best
rival's, so that what later kernels bought can be told after their reports have taken their place.
"""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any, NamedTuple

from flashmla_backend.bench.contenders import OURS

RESULTS = Path(__file__).parent / "results"
HISTORY_HEAD = ("device", "torch", "date", "commit", "command", "read_reduce_GBs", "mm8192_TFLOPs")
HISTORY_ROW = ("h", "s", "b", "len", "kind", "sum", "ideal_us", "best_rival_us")

MISSING = "not in this report"

Report = dict[str, Any]
Row = dict[str, Any]


class Reports(NamedTuple):
    """`kernels` is that of the H200, whose kernels are the newest. `histories`, by file, hold each device's newest
    report too, last."""

    kernels: Report
    kernels_path: Path
    other_devices: list[Report]
    histories: dict[str, list[Report]]
    steps: list[Report]  # by model and device
    serve: Report
    offline: Report
    short_prefills: Report
    host_time: Report
    bounds_cost: Report
    power: Report

    def of_each_device(self) -> list[Report]:
        return [self.kernels, *self.other_devices]

    def digest(self) -> str:
        """Of the kernel report; the plots carry it, so that it shows which report they are of."""
        return hashlib.sha256(self.kernels_path.read_bytes()).hexdigest()[:16]


def load(results: Path = RESULTS) -> Reports:
    """Read the newest of each kind. Raises FileNotFoundError naming the kind that is not there."""
    kernels_path, kernels = newest(results, "kernels-h200")
    others = {
        device: newest(results, f"kernels-{device}")[1] for device in ("h100",) if found(results, f"kernels-{device}")
    }
    return Reports(
        kernels=kernels,
        kernels_path=kernels_path,
        other_devices=list(others.values()),
        histories=dict(history(results, *one) for one in {"h200": kernels, **others}.items()),
        steps=[
            newest(results, f"steps-{run}")[1] for run in ("v3-attention-h100", "v3-attention-h200", "v2-lite-h200")
        ],
        serve=newest(results, "serve-v2-lite-h200")[1],
        offline=newest(results, "offline-v2-lite-h200")[1],
        short_prefills=newest(results, "short-prefills-h200")[1],
        host_time=newest(results, "host-time-h100")[1],
        bounds_cost=newest(results, "bounds-cost-h100")[1],
        power=newest(results, "power-h200")[1],
    )


def found(results: Path, kind: str) -> list[Path]:
    """Files named by that kind and a date."""
    return [path for path in results.glob("*.json") if re.fullmatch(rf"{kind}-\d{{4}}-\d\d-\d\d\w*", path.stem)]


def newest(results: Path, kind: str) -> tuple[Path, Report]:
    """By the date inside, not by name."""
    reports = [(path, json.loads(path.read_text())) for path in found(results, kind)]
    if not reports:
        raise FileNotFoundError(f"{results} holds no {kind}-DATE.json, which the document needs")
    return max(reports, key=lambda one: one[1]["date"])


def history(results: Path, device: str, newest_report: Report) -> tuple[str, list[Report]]:
    """Its file, and what belongs there: older reports as kept, then the newest."""
    path = results / f"kernels-history-{device}.json"
    kept = json.loads(path.read_text()) if path.exists() else []
    return path.name, [report for report in kept if report["date"] < newest_report["date"]] + [abridged(newest_report)]


def abridged(report: Report) -> Report:
    """What the history keeps of a kernel report; its rows read as the report's do."""
    rows = [
        {**{key: row[key] for key in HISTORY_ROW}, OURS: {"us": row[OURS]["us"]}}
        for row in report["rows"]
        if OURS in row and "best_rival_us" in row
    ]
    return {**{key: report[key] for key in HISTORY_HEAD}, "rows": rows}


def write_histories(reports: Reports, results: Path = RESULTS) -> None:
    """One report a line."""
    for file, history_of_device in reports.histories.items():
        (results / file).write_text("[\n" + ",\n".join(json.dumps(report) for report in history_of_device) + "\n]\n")


def tokens(length: int) -> str:
    return f"{length // 1024}K" if length % 1024 == 0 else str(length)
