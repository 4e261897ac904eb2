"""A report as two plots: what a user waits for, against what the server delivers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from flashmla_backend.bench.backends import OURS
from flashmla_backend.bench.serve.report import backends_of
from flashmla_backend.errors import Unsupported

PANELS = {"tpot_ms": "time per token, ms", "ttft_ms": "time to the first token, ms"}
MARKERS = {"rate": "o", "concurrency": "s"}


def plot(report: dict[str, Any], path: Path) -> None:
    """Write a PNG (or what the suffix says). Raises Unsupported without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise Unsupported(f"plots need matplotlib ({error}): pip install 'flashmla_backend[bench]'") from None
    figure = Figure(figsize=(12, 5), layout="constrained")
    panels = dict(zip(PANELS, figure.subplots(1, len(PANELS)), strict=True))
    for metric, axes in panels.items():
        for number, who in enumerate(backends_of(report["rows"])):
            for kind, marker in MARKERS.items():
                values = [row[who] for row in report["rows"] if who in row and row["kind"] == kind]
                if not values:
                    continue
                throughput = [value["output_throughput"] for value in values]
                style = {"color": f"C{number}", "marker": marker, "linewidth": 2 if who == OURS else 1}
                label = f"{who}, {'requests a second' if kind == 'rate' else 'requests at once'}"
                axes.plot(throughput, [value[metric]["p50"] for value in values], label=label, **style)
                axes.plot(throughput, [value[metric]["p99"] for value in values], alpha=0.35, linestyle=":", **style)
        axes.set(xlabel="tokens a second", ylabel=PANELS[metric], xlim=(0, None), ylim=(0, None))
        axes.set_title(f"{PANELS[metric]}: median, and dotted the 99th percentile", fontsize=10)
        axes.legend(fontsize=8)
    figure.suptitle(f"{report['model']}, {report['device']}, {report['engine']}, {report['date']}", fontsize=11)
    figure.savefig(path, dpi=130)
