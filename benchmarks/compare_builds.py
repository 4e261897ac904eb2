"""Free and batch-invariant mode of several builds of this package, on one GPU, each in a process of its own.

python benchmarks/compare_builds.py FOLDER [FOLDER ...] [--out builds.json]

A folder holds a `flashmla_backend` with its compiled module. The table: what batch-invariant mode costs, geometric mean
and greatest over the shapes of a line, and what free mode costs beside the first build's. Answers are checked before
calls are timed: exit code 1 if a build gave wrong ones.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

HEADS, BATCHES, LENGTHS = (16, 64, 128), (1, 8, 32, 128), (1024, 4096, 16384, 32768)
MANY_ROWS = (128,), (4,), (1, 8, 64), (4096, 16384)  # heads, s_q, batches, lengths: 8 row tiles
KINDS = ("fixed", "var")
SECONDS = 60  # for one build
FREE, INVARIANT = "ours", "ours-invariant"

Row = dict[str, Any]


def measure(out: Path) -> None:
    """The report of the build that is imported here."""
    import torch

    from flashmla_backend.bench import report
    from flashmla_backend.bench.problems import grid
    from flashmla_backend.bench.run import run

    shapes = grid(HEADS, (1,), BATCHES, LENGTHS, KINDS) + grid(*MANY_ROWS, KINDS)
    results = run(shapes, [FREE, INVARIANT], torch.device("cuda"), SECONDS, lambda done, of, what: None)
    made = report.make(results, sys.argv, None)
    out.write_text(json.dumps({**made, "wrong": sorted(results.wrong())}))


def measure_build(folder: Path, out: Path) -> Row:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, __file__, "--measure", str(out)]
    subprocess.run(command, env=environment, check=True, timeout=4 * SECONDS)
    made: Row = json.loads(out.read_text())
    out.unlink()
    return made


def family(row: Row) -> str:
    rows = row["h"] * row["s"]
    return f"b {'= 1' if row['b'] == 1 else '>= 8'}, {rows} rows"


def key(row: Row) -> tuple[object, ...]:
    return tuple(row[name] for name in ("h", "s", "b", "len", "kind"))


def print_table(made: dict[str, Row]) -> None:
    first = {key(row): row for row in next(iter(made.values()))["rows"]}
    print(f"{'build':12} {'shapes':14} {'cost of the mode':>16} {'worst':>6} {'free mode':>10}")
    for name, report in made.items():
        rows = [row for row in report["rows"] if FREE in row and INVARIANT in row]
        for shapes in sorted({family(row) for row in rows}):
            own = [row for row in rows if family(row) == shapes]
            costs = [row[INVARIANT]["us"] / row[FREE]["us"] for row in own]
            free = [row[FREE]["us"] / first[key(row)][FREE]["us"] for row in own if FREE in first.get(key(row), {})]
            free_mean = statistics.geometric_mean(free) if free else float("nan")
            print(f"{name:12} {shapes:14} {statistics.geometric_mean(costs):16.3f} {max(costs):6.2f} {free_mean:10.3f}")


def main() -> int:
    parser = argparse.ArgumentParser(description="Compare builds: what batch-invariant mode costs in each.")
    parser.add_argument("builds", type=Path, nargs="*", help="folders that hold a built flashmla_backend")
    parser.add_argument("--out", type=Path, default=Path("builds.json"), help="write the reports as JSON")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        measure(arguments.measure)
        return 0
    made: dict[str, Row] = {}
    for folder in arguments.builds:
        made[folder.name] = measure_build(folder, arguments.out.with_suffix(".part"))
        arguments.out.write_text(json.dumps(made, indent=1))
    for name, report in made.items():
        for note in report["notes"]:
            print(f"{name}: {note}")
    if made:
        print_table(made)
    return int(any(report["wrong"] for report in made.values()))


if __name__ == "__main__":
    sys.exit(main())
