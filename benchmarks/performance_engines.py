"""The tables of docs/performance.md about vLLM."""

from __future__ import annotations

from typing import Any

from performance_reports import Report, Reports
from short_prefills import DECODED, PREFILLED

from flashmla_backend.bench.contenders import OURS
from flashmla_backend.bench.offline import report as offline_report
from flashmla_backend.bench.serve import report as serve_report
from flashmla_backend.bench.steps import report as steps_report
from flashmla_backend.bench.tables import markdown


def steps(reports: Reports) -> str:
    """Those of the model in which attention is much of the step, device by device, then of one with few heads."""
    return "\n\n".join(map(steps_of_run, reports.steps))


def steps_of_run(report: Report) -> str:
    lines = []
    for row in report["rows"]:
        times: dict[str, Any] = {key: value for key, value in row.items() if isinstance(value, dict)}
        own = times.pop(OURS)
        least = min(times, key=lambda key: float(times[key]["ms"]))
        cells = [row["point"], f"{own['ms']:.2f}", f"{own['attention_ms'] / own['ms']:.0%}"]
        lines.append([*cells, f"{times[least]['ms']:.2f}, {least}", f"{steps_report.speed_up(row):.3f}"])
    model = f"{report['rows'][0]['model']}, {report['vllm']}, {report['device']}"
    head = [model, "ours, ms", "of which attention", "best of vLLM's own, ms", "speed-up"]
    return markdown([head, *lines])


def offline(reports: Reports) -> str:
    return offline_report.markdown(reports.offline)


def short_prefills(reports: Reports) -> str:
    """How many times longer the same prompts take when they are prefilled; a line for each model and context."""
    rows = [row for row in reports.short_prefills["rows"] if DECODED in row and PREFILLED in row]
    new = sorted({row["new"] for row in rows})
    ratios = {
        (row["model"], row["context"], row["requests"], row["new"]): row[PREFILLED]["ms"] / row[DECODED]["ms"]
        for row in rows
    }
    head = ["model", "tokens in the cache", "requests", *(f"{count} new tokens" for count in new)]
    lines = [
        [*map(str, case), *(f"{ratios[(*case, count)]:.2f}" for count in new)]
        for case in dict.fromkeys(point[:3] for point in ratios)
    ]
    return markdown([head, *lines])


def serving(reports: Reports) -> str:
    """Every load for every backend, and of our rows how many times better than the best of the others."""
    lines = []
    for row in reports.serve["rows"]:
        gained = serve_report.gains(row)
        for who in serve_report.backends_of([row]):
            value = row[who]
            times = [f"{value[metric][p]:.1f}" for metric in ("ttft_ms", "tpot_ms") for p in ("p50", "p99")]
            better = " / ".join(f"{gained[what]:.3f}" for what in ("ttft", "tpot", "throughput"))
            rate = f"{value['output_throughput']:.0f}"
            lines.append([row["load"], who, *times, rate, better if who == OURS else ""])
    head = [f"{reports.serve['model']}, {reports.serve['engine']}", "backend", "first token, ms: p50", "p99"]
    head += ["per token, ms: p50", "p99", "tokens/s", "gain: first token / per token / tokens/s"]
    return markdown([head, *lines])
