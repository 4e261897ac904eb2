"""Cells, a line for each row and first the head, as tables for the terminal and for documents."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

Cells = Sequence[Sequence[str]]


def table(cells: Cells, title: str) -> Table:
    head, *lines = cells
    made = Table(*head, title=title)
    for line in lines:
        made.add_row(*line)
    return made


def markdown(cells: Cells) -> str:
    head, *lines = cells
    return "\n".join(f"| {' | '.join(line)} |" for line in [head, ["---"] * len(head), *lines])
