"""What the commands of `flashmla bench` show: how far a run is, why it cannot be, and what came of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from flashmla_backend.errors import FlashMLAError

out, err = Console(), Console(stderr=True)


@contextmanager
def refusals() -> Iterator[None]:
    """What this package refuses ends the command, with its sentence and exit code 2."""
    try:
        yield
    except FlashMLAError as error:
        err.print(f"[bold red]{error}", highlight=False)
        raise typer.Exit(2) from None


@contextmanager
def progress_bar() -> Iterator[Callable[[int, int, str], None]]:
    """A bar; yields what moves it: (steps done, of how many, what comes next)."""
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=err) as progress:
        task = progress.add_task("starting", total=None)
        yield lambda done, of, what: progress.update(task, completed=done, total=of, description=what)


def show(table: Table, lines: Iterable[str], path: Path) -> None:
    """A report as its table, what that does not say, and where it lies."""
    out.print(table)
    for line in lines:
        out.print(f"- {line}", highlight=False, markup=False)
    out.print(f"report: {path}", highlight=False)
