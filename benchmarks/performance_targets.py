"""What was wanted of the kernels, and what their reports say of it: the table of targets of docs/performance.md."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import geometric_mean, median

from performance_measures import (
    GOAL,
    RAGGED_GOAL,
    best_rival,
    compared,
    excess,
    goal,
    long_rows,
    matmul_share,
    ours,
    ragged_ratios,
    speed_up,
)
from performance_reports import MISSING, Report, Reports, Row, tokens

from flashmla_backend.bench import report as kernels_report
from flashmla_backend.bench import tables
from flashmla_backend.bench.contenders import OURS
from flashmla_backend.bench.report import SLOWER


def time_targets(report: Report) -> list[list[str]]:
    limits = {(16, 1, 4096): 9, (128, 1, 4096): 12, (16, 8, 1024): 9, (128, 8, 1024): 13, (128, 32, 1024): 26}
    lines = []
    for (heads, batch, length), limit in limits.items():
        wanted = {"h": heads, "s": 1, "b": batch, "len": length, "kind": "fixed"}
        row = next((r for r in compared(report) if all(r[key] == value for key, value in wanted.items())), None)
        what = f"b={batch}, {tokens(length)}, {heads} heads"
        if row is None:
            lines.append([what, f"<= {limit} us", MISSING, "", ""])
        else:
            measured = f"{ours(row):.1f} us", f"{best_rival(row):.1f} us"
            lines.append([what, f"<= {limit} us", *measured, met(ours(row) <= limit)])
    return lines


def met(reached: bool) -> str:
    return "met" if reached else "not met"


def matmul_targets(report: Report) -> list[list[str]]:
    lines = []
    for s_q, wanted in {1: 0.90, 2: 0.92}.items():
        some = [r for r in long_rows(compared(report)) if r["s"] == s_q]
        what = f"share of the matmul rate, least of b=128, 8K and more, 128 heads, s_q {s_q}"
        if not some:
            lines.append([what, f">= {wanted:.0%}", MISSING, "", ""])
            continue
        least, theirs = (min(matmul_share(r, report, time) for r in some) for time in (ours, best_rival))
        lines.append([what, f">= {wanted:.0%}", f"{least:.1%}", f"{theirs:.1%}", met(least >= wanted)])
    return lines


def ragged_target(rows: Sequence[Row]) -> list[str]:
    what, wanted = "ragged against even at the same total tokens, median", f"<= {RAGGED_GOAL}"
    mine, theirs = ([ratio for _, ratio in ragged_ratios(rows, time)] for time in (ours, best_rival))
    if not mine:
        return [what, wanted, MISSING, "", ""]
    within = sum(ratio <= RAGGED_GOAL for ratio in mine)
    return [what, wanted, f"{median(mine):.3f}", f"{median(theirs):.3f}", f"met by {within} of {len(mine)}"]


def targets_of(report: Report) -> str:
    rows = compared(report)
    lines = time_targets(report)
    lines.append(ragged_target(rows))
    lines += matmul_targets(report)
    summary = kernels_report.summarise(rows)[OURS]
    mean, least, lost = summary["geomean"], summary["min"], summary["losing"]
    lines.append(["best rival / ours, geometric mean", ">= 1.35", f"{mean:.3f}", "", met(mean >= 1.35)])
    shown = f"{least:.3f}, {lost} of {len(rows)} below"
    lines.append(["best rival / ours, least", f">= {SLOWER}", shown, "", met(lost == 0)])
    distances = median(map(excess, rows)), median(excess(row, best_rival) for row in rows)
    medians = [f"{value:.3f}" for value in distances]
    lines.append(["(t - 4 us) / ideal, median", "<= 1.10", *medians, met(distances[0] <= 1.10)])
    table = tables.markdown([[f"target, {report['device']}", "wanted", "ours", "best rival", ""], *lines])
    return f"{table}\n\n{reachable(rows)}"


def targets(reports: Reports) -> str:
    return "\n\n".join(map(targets_of, reports.of_each_device()))


def reachable(rows: Sequence[Row]) -> str:
    """What the mean speed-up would be with calls at the goal."""
    singles = sum(row["b"] == 1 for row in rows)
    at_goal = [best_rival(row) / goal(row["ideal_us"]) for row in rows]
    but_singles = [speed_up(row) if row["b"] == 1 else ratio for row, ratio in zip(rows, at_goal, strict=True)]
    return (
        f"Were every call at {GOAL}, the geometric mean of best rival / ours\nwould be {geometric_mean(at_goal):.3f}; "
        f"were all there but the {singles} with single requests, {geometric_mean(but_singles):.3f}."
    )
