"""What is measured against what in docs/performance.md."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise

from performance_reports import Report, Row

from flashmla_backend.bench.contenders import OURS

FIXED_COST_US = 4.0  # what a call may take beyond the ideal: launches, prologue, epilogue
GOAL_OF_IDEAL = 1.08  # and of it
GOAL = f"{GOAL_OF_IDEAL} ideal + {FIXED_COST_US:.0f} us"
RAGGED_GOAL = 1.06  # times an even batch of as many tokens

Time = Callable[[Row], float]


def ours(row: Row) -> float:
    """Microseconds."""
    time: float = row[OURS]["us"]
    return time


def best_rival(row: Row) -> float:
    """Microseconds."""
    time: float = row["best_rival_us"]
    return time


def compared(report: Report) -> list[Row]:
    """Rows in which we and a rival were measured."""
    return [row for row in report["rows"] if OURS in row and "best_rival_us" in row]


def speed_up(row: Row) -> float:
    return best_rival(row) / ours(row)


def goal(ideal_us: float) -> float:
    """Microseconds that a call may take."""
    return GOAL_OF_IDEAL * ideal_us + FIXED_COST_US


def excess(row: Row, time: Time = ours) -> float:
    """(t - 4 us) / ideal."""
    return (time(row) - FIXED_COST_US) / float(row["ideal_us"])


def matmul_share(row: Row, report: Report, time: Time = ours) -> float:
    """Of the rate of the 8192^3 matmul in the same run."""
    return float(row["flops"]) / time(row) / 1e6 / float(report["mm8192_TFLOPs"])


def as_fixed(row: Row, rows: Sequence[Row], time: Time) -> float | None:
    """Microseconds of a fixed batch of as many tokens as this ragged one: on the line through the two measured lengths
    around its mean; None where there are not two."""
    same = [r for r in rows if r["kind"] == "fixed" and all(r[key] == row[key] for key in ("h", "s", "b"))]
    same.sort(key=lambda r: int(r["len"]))
    if len(same) < 2:
        return None
    mean = row["sum"] / row["b"]
    low, high = next((pair for pair in pairwise(same) if mean < pair[1]["len"]), (same[-2], same[-1]))
    return time(low) + (time(high) - time(low)) * (mean - low["len"]) / (high["len"] - low["len"])


def ragged_ratios(rows: Sequence[Row], time: Time) -> list[tuple[Row, float]]:
    """Ragged batches, and how many times longer they take than fixed ones of as many tokens."""
    pairs = [(row, as_fixed(row, rows, time)) for row in rows if row["kind"] == "var"]
    return [(row, time(row) / fixed) for row, fixed in pairs if fixed is not None]


def long_rows(rows: Iterable[Row]) -> list[Row]:
    """Batches in which the arithmetic outweighs everything else."""
    return [r for r in rows if r["h"] == 128 and r["b"] == 128 and r["len"] >= 8192 and r["kind"] == "fixed"]
