"""A report as two plots: time against the ideal, and speed-up against the best of the others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from flashmla_backend.bench.contenders import OURS
from flashmla_backend.bench.report import contenders_of, speed_ups
from flashmla_backend.errors import Unsupported


def plot(report: dict[str, Any], path: Path) -> None:
    """Write a PNG (or what the suffix says). Raises Unsupported without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise Unsupported(f"plots need matplotlib ({error}): pip install 'flashmla_backend[bench]'") from None
    figure = Figure(figsize=(12, 5), layout="constrained")
    against_ideal, against_rivals = figure.subplots(1, 2)
    rows = report["rows"]

    for name in contenders_of(rows):
        points = [(row["ideal_us"], row[name]["us"]) for row in rows if name in row and row["ideal_us"] > 0]
        against_ideal.plot(*zip(*points, strict=True), ".", label=name, markersize=9 if name == OURS else 5)
    ideal = sorted(row["ideal_us"] for row in rows if row["ideal_us"] > 0)
    against_ideal.plot(ideal, ideal, "k-", linewidth=0.8, label="ideal")
    against_ideal.set(xscale="log", yscale="log", xlabel="ideal, us", ylabel="whole call, us")
    against_ideal.set_title("time against what the machine's own rates allow", fontsize=10)
    against_ideal.legend(fontsize=8)

    compared = speed_ups(rows)
    for heads in sorted({row["h"] for row, _ in compared}):
        points = [(row["ideal_us"], ratio) for row, ratio in compared if row["h"] == heads]
        against_rivals.plot(*zip(*points, strict=True), ".", label=f"{heads} heads")
    against_rivals.axhline(1, color="k", linewidth=0.8)
    against_rivals.set(xscale="log", yscale="log", xlabel="ideal, us", ylabel="best of the others / ours")
    against_rivals.set_title("speed-up", fontsize=10)
    if compared:
        against_rivals.legend(fontsize=8)
    figure.suptitle(f"{report['device']}, {report.get('date') or ''}", fontsize=11)
    figure.savefig(path, dpi=130)
