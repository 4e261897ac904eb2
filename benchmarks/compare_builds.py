"""Several builds of this package beside each other, on one machine: each in processes of its own, taking turns.

python benchmarks/compare_builds.py FOLDER FOLDER.. [--turns 3] [--each] [--out builds.json] [KERNEL_OPTIONS..]

A folder holds a `flashmla_backend` with its compiled module, as `pip install --no-deps --target FOLDER .` makes one.
KERNEL_OPTIONS go to `flashmla bench kernels`, which checks answers before it times calls: shapes, --impls, --budget.
A shape's time is the least of its turns. The table: what batch-invariant mode costs, and how long calls take beside the
first build's; geometric mean, least and greatest over the shapes of a line. Exit code 1 if a build failed or answered
wrong.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

FREE, INVARIANT = "ours", "ours-invariant"  # as every build calls them: this one need not be installed
DEFAULTS = ["--heads=16,64,128", "--sq=1,4", "--batch=1,8,32,128", "--lens=1024,4096,16384,32768", "--budget=60"]
RUN = """
import sys
from pathlib import Path
import flashmla_backend
if Path(flashmla_backend.__file__).resolve().parents[1] != Path.cwd():
    sys.exit(f"{flashmla_backend.__file__} hides the build in {Path.cwd()}: uninstall it, if it is an editable one")
from flashmla_backend.cli import app
app()
"""

Shape = tuple[Any, ...]  # heads, s_q, batch, tokens, kind
Times = dict[Shape, dict[str, float]]  # -> microseconds by contender


def measure(folder: Path, options: list[str], timeout_s: float) -> tuple[Times, int]:
    """What this build takes, and the exit code of who measured it. Raises TimeoutExpired."""
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "kernels.json"
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])}
        command = [sys.executable, "-c", RUN, "bench", "kernels", *options, "--out", str(out)]
        # In the folder, since Python looks where it runs first.
        done = subprocess.run(command, env=environment, cwd=folder, stdout=subprocess.DEVNULL, timeout=timeout_s)
        rows = json.loads(out.read_text())["rows"] if out.exists() else []
    times = {}
    for row in rows:
        shape = tuple(row[name] for name in ("h", "s", "b", "len", "kind"))
        times[shape] = {name: row[name]["us"] for name in (FREE, INVARIANT) if name in row}
    return times, done.returncode


def take_in(best: Times, turn: Times) -> None:
    """Keep the least of each."""
    for shape, by_name in turn.items():
        mine = best.setdefault(shape, {})
        mine |= {name: min(us, mine.get(name, us)) for name, us in by_name.items()}


def family(shape: Shape) -> str:
    heads, s_q, batch, _, _ = shape
    return f"b {'= 1' if batch == 1 else '>= 8' if batch >= 8 else '< 8'}, {heads * s_q} rows"


def ratios(times: Times, name: str, than: Times, than_name: str, of: str) -> list[float]:
    return [
        by_name[name] / than[shape][than_name]
        for shape, by_name in times.items()
        if family(shape) == of and name in by_name and than_name in than.get(shape, {})
    ]


def spread(values: list[float]) -> str:
    """Geometric mean, least and greatest."""
    return f"{statistics.geometric_mean(values):.3f} ({min(values):.2f} .. {max(values):.2f})" if values else "-"


def print_table(made: dict[str, Times]) -> None:
    first = next(iter(made.values()))
    print(f"{'build':12} {'shapes':16} {'cost of the mode':>22} {'free mode':>22} {'batch-invariant':>22}")
    for build, times in made.items():
        for shapes in sorted(set(map(family, times))):
            cost = spread(ratios(times, INVARIANT, times, FREE, shapes))
            free, invariant = (spread(ratios(times, name, first, name, shapes)) for name in (FREE, INVARIANT))
            print(f"{build:12} {shapes:16} {cost:>22} {free:>22} {invariant:>22}")


def print_each(made: dict[str, Times]) -> None:
    print("microseconds of a call: " + ", ".join(made))
    for shape in next(iter(made.values())):
        for name in (FREE, INVARIANT):
            cells = [f"{times[shape][name]:10.2f}" for times in made.values() if name in times.get(shape, {})]
            if cells:
                print(f"{' '.join(map(str, shape)):26} {name:15}" + "".join(cells))


def main() -> int:
    parser = argparse.ArgumentParser(description="Compare builds; other options go to `flashmla bench kernels`.")
    parser.add_argument("builds", type=Path, nargs="+", help="folders that hold a built flashmla_backend")
    parser.add_argument("--turns", type=int, default=2, help="processes of each build")
    parser.add_argument("--each", action="store_true", help="print every shape, too")
    parser.add_argument("--timeout", type=float, default=240, help="seconds for one process")
    parser.add_argument("--out", type=Path, help="write the times of every turn as JSON")
    arguments, options = parser.parse_known_args()
    # Of an option that is given twice the last counts.
    options = [f"--impls={FREE},{INVARIANT}", *(options or DEFAULTS)]
    made: dict[str, Times] = {folder.name: {} for folder in arguments.builds}
    kept: list[dict[str, Any]] = []
    failed = False
    for turn in range(1, arguments.turns + 1):
        for folder in arguments.builds:
            times, code = measure(folder.resolve(), options, arguments.timeout)
            if code:
                print(f"{folder.name}, turn {turn}: exit code {code}", flush=True)
                failed = True
            take_in(made[folder.name], times)
            kept.append({"build": folder.name, "turn": turn, "us": [[*shape, us] for shape, us in times.items()]})
            if arguments.out:
                arguments.out.write_text(json.dumps(kept, indent=1))
        print(f"after turn {turn} of {arguments.turns}")
        print_table(made)
    if arguments.each:
        print_each(made)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
