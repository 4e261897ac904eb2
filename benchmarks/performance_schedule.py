"""What docs/performance.md shows of the tile scheduler, worked out by its specification: today's scheduler, whatever
that of a report was."""

from __future__ import annotations

from dataclasses import fields
from itertools import pairwise

from performance_reports import Report, Row

from flashmla_backend.bench.problems import Shape
from flashmla_backend.schedule import (
    TILE_ROWS,
    CostModel,
    Hands,
    Piece,
    candidate_caps,
    cut,
    deal,
    level,
    loads,
    make_schedule,
    piece_counts,
    row_tiles_of,
)

NAMES, PAGES, PARTS = "ABCDEFGH", (40, 3, 9, 17, 2, 28, 5, 12), 6  # of the batch that is drawn
MODEL = CostModel()


def pieces(row: Row, report: Report) -> int:
    """Into how many the longest request of a measured batch was cut."""
    shape = Shape(row["h"], row["s"], row["b"], row["len"], row["kind"])
    rows = shape.heads * shape.s_q
    offsets = make_schedule(shape.lengths(), row_tiles_of(rows, 1), report["sms"], rows).split_offsets
    return max(1, *(end - begin for begin, end in pairwise(offsets)))


def drawing() -> str:
    """Four proposals for one batch: a letter is a page of that request, a bar the fixed cost of a work item."""
    # With more requests than parts there is no cap for one piece a part.
    no_cut, _, three_a_part, mean, *_ = candidate_caps(PAGES, PARTS)
    proposals = {
        "no cut": deal(cut(PAGES, no_cut), PARTS, MODEL),
        **{f"at most {cap} pages": deal(cut(PAGES, cap), PARTS, MODEL) for cap in (three_a_part, mean)},
        "level": level(PAGES, PARTS, MODEL),
    }
    columns = [
        [f"{name},", *prediction(hands), *map(drawn, hands)] for name, hands in proposals.items() if hands is not None
    ]
    widths = [max(map(len, column)) for column in columns]
    lines = ["pages: " + ", ".join(f"{name} {pages}" for name, pages in zip(NAMES, PAGES, strict=True)), ""]
    for line in zip(*columns, strict=True):
        lines.append("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
    return "\n".join(lines)


def prediction(hands: Hands) -> list[str]:
    counts = piece_counts(hands, len(PAGES))
    partials = sum(number for number in counts if number > 1)
    of_parts = MODEL.of_parts(loads(hands, MODEL), sum(PAGES))
    microseconds = (of_parts + MODEL.of_reduction(partials, TILE_ROWS)) / 1e3
    return [f"{sum(counts)} items, {partials} partial results:", f"{microseconds:.0f} us predicted"]


def drawn(hand: list[Piece]) -> str:
    return "".join("|" + NAMES[piece.request] * (piece.end - piece.begin) for piece in hand)


def costs() -> dict[str, int]:
    """Nanoseconds by name of the cost model's fields."""
    return {field.name: getattr(MODEL, field.name) for field in fields(MODEL)}
