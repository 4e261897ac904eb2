"""A report as a plot: what a decode step takes with each backend, and how much of it is attention."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from flashmla_backend.bench.steps.report import backends_of
from flashmla_backend.errors import Unsupported

OFF_SCALE = 1.6  # bars longer than so many times the best backend's longest are cut, and say how long they are


def plot(report: dict[str, Any], path: Path) -> None:
    """Write a PNG (or what the suffix says). Raises Unsupported without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise Unsupported(f"plots need matplotlib ({error}): pip install 'flashmla_backend[bench]'") from None
    names, models = backends_of(report["rows"]), list(dict.fromkeys(row["model"] for row in report["rows"]))
    figure = Figure(figsize=(11, 4.5 * len(models)), layout="constrained")
    for axes, model in zip(figure.subplots(len(models), squeeze=False)[:, 0], models, strict=True):
        rows = [row for row in report["rows"] if row["model"] == model]
        top = OFF_SCALE * max(min(row[name]["ms"] for name in names if name in row) for row in rows)
        for number, name in enumerate(names):
            places = [
                i + (number - (len(names) - 1) / 2) * 0.8 / len(names) for i, row in enumerate(rows) if name in row
            ]
            values = [row[name] for row in rows if name in row]
            bars = axes.bar(places, [v["ms"] for v in values], 0.75 / len(names), color=f"C{number}", label=name)
            axes.bar(
                places,
                [v.get("attention_ms", 0.0) for v in values],
                0.75 / len(names),
                color="black",
                alpha=0.25,
                label="of which attention" if number == len(names) - 1 else None,
            )
            for bar, value in zip(bars, values, strict=True):
                middle = bar.get_x() + bar.get_width() / 2
                axes.text(middle, min(value["ms"], top), f"{value['ms']:.1f}", ha="center", va="bottom", fontsize=7)
        axes.set_xticks(range(len(rows)), [row["point"] for row in rows], fontsize=8)
        axes.set(ylabel="ms a decode step", ylim=(0, top * 1.06), xlabel="requests x tokens in the cache")
        axes.set_title(model, fontsize=10)
        axes.legend(fontsize=8)
    figure.suptitle(f"{report['device']}, {report['vllm']}, {report['date']}", fontsize=11)
    figure.savefig(path, dpi=130)
