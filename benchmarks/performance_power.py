"""The table of docs/performance.md about power."""

from __future__ import annotations

from performance_reports import Reports
from power import MATMUL, SIDE

from flashmla_backend.bench.tables import markdown


def power(reports: Reports) -> str:
    """Calls without a pause, beside a large matmul without a pause."""
    report = reports.power
    (matmul,) = (row for row in report["rows"] if row["impl"] == MATMUL)
    lines = []
    for row in report["rows"]:
        shape = f"{SIDE} x {SIDE} x {SIDE}" if row is matmul else f"{row['heads']} heads, s_q {row['s_q']}"
        share = row["tflops"] / matmul["tflops"]
        rates = [f"{row['tflops']:.0f}", f"{share:.0%}", f"{row['gbs']:.0f}" if "gbs" in row else "-"]
        lines.append([shape, row["impl"], *rates, f"{row['watts']:.0f}", f"{row['pj_per_flop']:.2f}"])
    (limit,) = report["power_limit_w"]
    head = [f"{report['device']}, {limit:.0f} W", "", "TFLOP/s", "of the matmul's", "GB/s", "W", "pJ a FLOP"]
    return markdown([head, *lines])
