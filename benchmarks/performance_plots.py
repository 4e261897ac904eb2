"""The plots of docs/performance.md; PLOTS names their files and what draws them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from performance_measures import (
    GOAL,
    RAGGED_GOAL,
    best_rival,
    compared,
    goal,
    ours,
    ragged_ratios,
    speed_up,
)
from performance_reports import RESULTS, Reports, Row, tokens

from flashmla_backend.errors import Unsupported

OURS_COLOUR, RIVAL_COLOUR, LINE_COLOUR = "#1f5fa8", "#d08a2e", "#444444"
MAP_RANGE = 1.4  # the map's colours are full where one is so many times faster than the other
CLOSE_LOOK_US = 30.0


def speed_up_map(figure: Any, reports: Reports) -> None:
    """Best rival / ours of every shape: a line for heads and s_q, a column for batch and length."""
    rows = compared(reports.kernels)
    lines = sorted({(row["h"] * row["s"], row["h"], row["s"]) for row in rows})
    lengths = sorted({row["len"] for row in rows})
    kinds = [kind for kind in ("fixed", "var") if any(row["kind"] == kind for row in rows)]
    figure.set_size_inches(13, 4.3 * len(kinds) + 0.6)
    for axes, kind in zip(figure.subplots(len(kinds), squeeze=False)[:, 0], kinds, strict=True):
        some = [row for row in rows if row["kind"] == kind]
        batches = sorted({row["b"] for row in some})
        columns = [(batch, length) for batch in batches for length in lengths]
        cells = [[math.nan] * len(columns) for _ in lines]
        for row in some:
            line = lines.index((row["h"] * row["s"], row["h"], row["s"]))
            cells[line][columns.index((row["b"], row["len"]))] = speed_up(row)
        image = axes.imshow(
            [[math.log(cell) for cell in line] for line in cells],
            cmap="RdBu",
            vmin=-math.log(MAP_RANGE),
            vmax=math.log(MAP_RANGE),
            aspect="auto",
        )
        for y, values in enumerate(cells):
            for x, cell in enumerate(values):
                dark = abs(math.log(cell)) > 0.7 * math.log(MAP_RANGE)  # false for what was not measured
                if not math.isnan(cell):
                    axes.text(x, y, f"{cell:.2f}", ha="center", va="center", size=7.5, color="w" if dark else "k")
        for edge in range(len(lengths), len(columns), len(lengths)):
            axes.axvline(edge - 0.5, color="w", linewidth=4)
        axes.set_xticks(range(len(columns)), [tokens(length) for _, length in columns], size=8)
        axes.set_yticks(range(len(lines)), [f"{heads} x {s_q}" for _, heads, s_q in lines], size=8)
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        axes.set_ylabel("heads x s_q")
        axes.set_xlabel("tokens of a request" + (", on average" if kind == "var" else ""))
        for group, batch in enumerate(batches):
            middle = (group + 0.5) * len(lengths) - 0.5
            axes.text(middle, -0.7, f"b={batch}", ha="center", va="bottom", size=9)
        axes.set_title({"fixed": "even batches", "var": "ragged batches"}[kind], fontsize=11, pad=18, loc="left")
        bar = figure.colorbar(image, ax=axes, pad=0.01, aspect=30)
        marks = [1 / MAP_RANGE, 0.85, 1.0, 1.18, MAP_RANGE]
        bar.set_ticks([math.log(mark) for mark in marks], labels=[f"{mark:.2f}" for mark in marks])
        bar.set_label("best rival / ours", size=9)
        bar.ax.tick_params(labelsize=8)


def against_ideal(figure: Any, reports: Reports) -> None:
    """Time over ideal, where ideal is what the run's own rates allow: all calls, and the longer ones looked at closely.

    The two colours stand a little apart, or one would hide the other.
    """
    figure.set_size_inches(12, 4.6)
    rows = compared(reports.kernels)
    ideals = sorted({row["ideal_us"] for row in rows})
    for axes, shortest in zip(figure.subplots(1, 2), (0.0, CLOSE_LOOK_US), strict=True):
        some = [row for row in rows if row["ideal_us"] >= shortest]
        for time, label, colour, shift in (
            (best_rival, "best rival", RIVAL_COLOUR, 1.05),
            (ours, "ours", OURS_COLOUR, 1 / 1.05),
        ):
            points = [(row["ideal_us"] * shift, time(row) / row["ideal_us"]) for row in some]
            axes.plot(*zip(*points, strict=True), ".", color=colour, label=label, markersize=5, alpha=0.7, mew=0)
        shown = [ideal for ideal in ideals if ideal >= shortest]
        axes.plot(
            shown, [goal(ideal) / ideal for ideal in shown], color=LINE_COLOUR, linewidth=1, label=f"goal: {GOAL}"
        )
        axes.set(xscale="log", xlabel="ideal time of a call, us", ylabel="time / ideal")
        ticks = [tick for tick in (0.5, 1, 3, 10, 30, 100, 300, 1000, 3000, 10000) if shown[0] <= tick <= shown[-1]]
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        if shortest == 0:
            axes.set(yscale="log", ylim=(0.98, None), title="all shapes")
            marks = [1, 1.5, 2, 3, 5, 10, 20, 40]
            axes.set_yticks(marks, [f"{mark:g}" for mark in marks])
            axes.legend(fontsize=9, frameon=False, markerscale=2)
        else:
            axes.set(ylim=(1.0, None), title=f"shapes of {shortest:.0f} us and more")
        axes.minorticks_off()
        clean(axes)


def ragged_cost(figure: Any, reports: Reports) -> None:
    """Ragged batches over even ones of as many tokens, by length; a strip for ours and one for the best rival."""
    rows = compared(reports.kernels)
    found = {"ours": ragged_ratios(rows, ours), "best rival": ragged_ratios(rows, best_rival)}
    batches = sorted({row["b"] for row, _ in found["ours"]})
    lengths = sorted({row["len"] for row, _ in found["ours"]})
    figure.set_size_inches(11, 3.8)
    panels = figure.subplots(1, len(batches), sharey=True, squeeze=False)[0]
    for axes, batch in zip(panels, batches, strict=True):
        for (label, ratios), colour, side in zip(
            found.items(), (OURS_COLOUR, RIVAL_COLOUR), (-0.17, 0.17), strict=True
        ):
            strip(axes, [one for one in ratios if one[0]["b"] == batch], lengths, side, colour, label)
        axes.axhline(RAGGED_GOAL, color=LINE_COLOUR, linewidth=1, linestyle="--", label=f"goal: {RAGGED_GOAL}")
        axes.set_xticks(range(len(lengths)), [tokens(length) for length in lengths])
        axes.set_title(f"b={batch}", fontsize=10)
        axes.set_xlabel("mean tokens of a request")
        clean(axes)
    panels[0].set_ylabel("time, ragged / even\nat the same total tokens")
    panels[-1].legend(fontsize=9, frameon=False, markerscale=2)


def strip(
    axes: Any, ratios: Sequence[tuple[Row, float]], lengths: Sequence[int], side: float, colour: str, label: str
) -> None:
    """A dot for each ratio, a bar at the median of each length."""
    places = [lengths.index(row["len"]) + side for row, _ in ratios]
    axes.plot(places, [ratio for _, ratio in ratios], ".", color=colour, markersize=5, alpha=0.7, mew=0, label=label)
    for index, length in enumerate(lengths):
        if some := [ratio for row, ratio in ratios if row["len"] == length]:
            ends = [index + side - 0.13, index + side + 0.13]
            axes.plot(ends, [median(some)] * 2, color=colour, linewidth=2)


def clean(axes: Any) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)


PLOTS: dict[str, Callable[[Any, Reports], None]] = {
    "performance-map-h200.png": speed_up_map,
    "performance-ideal-h200.png": against_ideal,
    "performance-ragged-h200.png": ragged_cost,
}


def draw(reports: Reports, folder: Path = RESULTS) -> list[Path]:
    """Write all plots. Raises Unsupported without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise Unsupported(f"plots need matplotlib ({error}): pip install 'flashmla_backend[bench]'") from None
    paths = []
    for file, plot in PLOTS.items():
        figure = Figure(layout="constrained")
        plot(figure, reports)
        figure.suptitle(f"{reports.kernels['device']}, {reports.kernels['commit']}", fontsize=9, x=0.99, ha="right")
        figure.savefig(folder / file, dpi=120, metadata={"Source": reports.digest()})
        paths.append(folder / file)
    return paths
