"""The tables of docs/performance.md; each is a function of the reports, and SECTIONS names them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from statistics import geometric_mean, median

import performance_schedule as schedule
from performance_engines import offline, serving, short_prefills, steps
from performance_measures import (
    RAGGED_GOAL,
    best_rival,
    compared,
    excess,
    long_rows,
    matmul_share,
    ours,
    ragged_ratios,
    speed_up,
)
from performance_power import power
from performance_reports import MISSING, Report, Reports, Row, tokens
from performance_targets import targets

from flashmla_backend.bench import report as kernels_report
from flashmla_backend.bench import tables
from flashmla_backend.bench.contenders import INVARIANT, OURS
from flashmla_backend.bench.report import SLOWER

ROWS_LENGTH = 8192
WORST = 12


def markdown(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    return tables.markdown([head, *lines])


def name(row: Row) -> str:
    return f"{row['h']} heads, s_q {row['s']}, b={row['b']}, {tokens(row['len'])} {row['kind']}"


def run(reports: Reports) -> str:
    rates = ["reads, GB/s", "multiplies bf16, TFLOP/s"]
    lines = []
    for report in reports.of_each_device():
        summary = kernels_report.summarise(compared(report))[OURS]
        lines.append(
            [
                report["device"],
                report["commit"],
                report["date"][:10],
                str(summary["n"]),
                f"{report['read_reduce_GBs']:.0f}",
                f"{report['mm8192_TFLOPs']:.0f}",
                f"{summary['geomean']:.3f}",
                str(summary["losing"]),
            ]
        )
    return markdown(["device", "commit", "date", "shapes", *rates, "best rival / ours", "lost"], lines)


def overview(reports: Reports) -> str:
    rows = compared(reports.kernels)
    groups = {"all": rows}
    for key, words in {"h": "{} heads", "s": "s_q {}", "b": "b={}", "len": "{} tokens", "kind": "{} lengths"}.items():
        for value in sorted({row[key] for row in rows}):
            shown = words.format(tokens(value) if key == "len" else value)
            groups[shown] = [row for row in rows if row[key] == value]
    lines = []
    for shown, some in groups.items():
        summary = kernels_report.summarise(some)[OURS]
        lines.append(
            [
                shown,
                str(summary["n"]),
                f"{summary['geomean']:.3f}",
                f"{summary['min']:.3f}",
                str(summary["losing"]),
                f"{median(map(excess, some)):.2f}",
            ]
        )
    return markdown(["shapes", "number", "geometric mean", "least", "lost", "median (t - 4 us) / ideal"], lines)


def distance(reports: Reports) -> str:
    rows = compared(reports.kernels)
    lengths = sorted({row["len"] for row in rows})
    lines = []
    for batch in sorted({row["b"] for row in rows}):
        line = [f"b={batch}"]
        for length in lengths:
            some = [row for row in rows if row["b"] == batch and row["len"] == length]
            medians = [median(excess(row, time) for row in some) for time in (ours, best_rival) if some]
            line.append("{:.2f} ({:.2f})".format(*medians) if some else "-")
        lines.append(line)
    return markdown(["", *map(tokens, lengths)], lines)


def matmul(reports: Reports) -> str:
    report = reports.kernels
    some = {(row["s"], row["len"]): row for row in long_rows(compared(report))}
    lengths = sorted({length for _, length in some})
    lines = []
    for s_q in sorted({s_q for s_q, _ in some}):
        found = [some.get((s_q, length)) for length in lengths]
        shares = [[f"{matmul_share(r, report, time):.1%}" for time in (ours, best_rival)] if r else [] for r in found]
        lines.append([f"s_q {s_q}, {128 * s_q} rows", *(" / ".join(pair) or "-" for pair in shares)])
    return markdown(["ours / best rival", *map(tokens, lengths)], lines)


def ragged(reports: Reports) -> str:
    rows = compared(reports.kernels)
    mine, theirs = ragged_ratios(rows, ours), ragged_ratios(rows, best_rival)
    lines = []
    for batch in sorted({row["b"] for row, _ in mine}):
        own, other = ([ratio for row, ratio in found if row["b"] == batch] for found in (mine, theirs))
        within = f"{sum(ratio <= RAGGED_GOAL for ratio in own)} of {len(own)}"
        lines.append([f"b={batch}", f"{median(own):.3f}", f"{max(own):.2f}", within, f"{median(other):.3f}"])
    return markdown(["", "median", "most", f"within {RAGGED_GOAL}", "best rival's median"], lines)


def worst(reports: Reports) -> str:
    head = ["ideal, us", "ours, us", "best rival, us", "who", "best rival / ours", "pieces"]
    tables = [markdown([f"shape, {report['device']}", *head], worst_of(report)) for report in reports.of_each_device()]
    return "\n\n".join(tables)


def worst_of(report: Report) -> list[list[str]]:
    rivals = [n for n in kernels_report.contenders_of(report["rows"]) if n not in (OURS, INVARIANT)]
    lines = []
    for row in sorted(compared(report), key=speed_up)[:WORST]:
        rival = min((n for n in rivals if n in row), key=lambda n: float(row[n]["us"]))
        numbers = [f"{value:.1f}" for value in (row["ideal_us"], ours(row), best_rival(row))]
        lines.append([name(row), *numbers, rival, f"{speed_up(row):.4f}", str(schedule.pieces(row, report))])
    return lines


CLASSES: dict[str, Callable[[Row], bool]] = {
    "all": lambda row: True,
    "b=1": lambda row: row["b"] == 1,
    "ragged": lambda row: row["kind"] == "var",
    "fixed, b >= 8, up to 64 rows": lambda row: row["kind"] == "fixed" and row["b"] > 1 and row["h"] * row["s"] <= 64,
    "fixed, b >= 8, 128 rows": lambda row: row["kind"] == "fixed" and row["b"] > 1 and row["h"] * row["s"] == 128,
    "fixed, b >= 8, 256 rows and more": lambda row: (
        row["kind"] == "fixed" and row["b"] > 1 and row["h"] * row["s"] >= 256
    ),
}


def history(reports: Reports) -> str:
    """Each report, device by device: rates of its run, and by class the geometric mean of best rival / ours."""
    return "\n\n".join(map(history_of_device, reports.histories.values()))


def history_of_device(reports: list[Report]) -> str:
    lines = []
    for report in reports:
        rows = compared(report)
        ratios = [[speed_up(row) for row in rows if belongs(row)] for belongs in CLASSES.values()]
        lines.append(
            [
                f"{report['commit']}, {report['date'][:16].replace('T', ' ')}",
                f"{report['mm8192_TFLOPs']:.0f}",
                *(f"{geometric_mean(some):.3f}" if some else "-" for some in ratios),
                str(sum(ratio < SLOWER for ratio in ratios[0])),
                f"{median(map(excess, rows)):.2f}",
            ]
        )
    head = [f"commit, {reports[-1]['device']}", "matmul, TFLOP/s", *CLASSES, "lost", "median (t - 4 us) / ideal"]
    return markdown(head, lines)


def cost_model(reports: Reports) -> str:
    shown = {"page": "a page", "item": "an item", "empty_item": "an empty item", "memory": "a page read by all"}
    shown |= {"reduction": "a reduction", "partial_row": "a partial row"}
    costs = schedule.costs()
    units = {"partial_row": "ps"}
    values = [f"{value} {units.get(key, 'ns')}" for key, value in costs.items()]
    return markdown([shown.get(key, key) for key in costs], [values])


def schedule_drawn(reports: Reports) -> str:
    return f"```text\n{schedule.drawing()}\n```"


def rows(reports: Reports) -> str:
    """Even batches of 8K by rows: the same bytes, more and more arithmetic."""
    report = reports.kernels
    shapes = [(heads, 1) for heads in (16, 32, 64, 128)] + [(128, 2), (128, 4)]
    some = {
        (row["b"], row["h"], row["s"]): row
        for row in compared(report)
        if row["kind"] == "fixed" and row["len"] == ROWS_LENGTH
    }
    lines = []
    for batch in sorted({batch for batch, _, _ in some}):
        found = [some.get((batch, *shape)) for shape in shapes]
        cells = [f"{ours(r):.1f} / {best_rival(r):.1f}, {schedule.pieces(r, report)}" if r else "-" for r in found]
        lines.append([f"b={batch}", *cells])
    return markdown(["", *(f"{heads * s_q} rows" for heads, s_q in shapes)], lines)


def invariance(report: Report) -> str:
    single = {row["b"] == 1 for row in report["rows"] if INVARIANT in row}
    return kernels_report.invariance_line(report) if len(single) == 2 else f"batch-invariant / free: {MISSING}"


def extras(reports: Reports) -> str:
    bounds, host = reports.bounds_cost, reports.host_time
    dearest = max(step["ratio"] for step in bounds["steps"])
    lines = [
        *(
            f"- Time of a call, {invariance(report)} ({report['device']}, {report['commit']})."
            for report in reports.of_each_device()
        ),
        f"- Bounds checks, whole steps of {bounds['layers']} layers, on / off: geometric mean "
        f"{bounds['geometric_mean']:.3f}, most {dearest:.3f}.",
        f"- The host's microseconds a call, b={host['batch']}, outside graphs:",
    ]
    table = markdown(list(host["host_us"]), [[f"{value:.1f}" for value in host["host_us"].values()]])
    return "\n".join([*lines, "", table])


SECTIONS: dict[str, Callable[[Reports], str]] = {
    function.__name__: function
    for function in (
        run,
        overview,
        rows,
        schedule_drawn,
        targets,
        distance,
        matmul,
        power,
        ragged,
        worst,
        history,
        cost_model,
        extras,
        steps,
        serving,
        offline,
        short_prefills,
    )
}
