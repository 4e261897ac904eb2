"""The commands of `flashmla bench`."""

from __future__ import annotations

import json
import signal
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from flashmla_backend.bench.console import err, out, progress_bar, refusals
from flashmla_backend.bench.offline.cli import offline
from flashmla_backend.bench.serve.cli import serve
from flashmla_backend.bench.soak.cli import soak
from flashmla_backend.bench.steps.cli import steps
from flashmla_backend.errors import InvalidArgument

app = typer.Typer(help="Measure decode kernels and engines, ours beside others.", no_args_is_help=True)
app.command()(steps)
app.command()(serve)
app.command()(offline)
app.command()(soak)


@app.callback()
def end_what_runs() -> None:
    """Asked to end, by `timeout` say, a command ends as by Ctrl-C: first what it has started."""
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))


GPU_DEFAULTS = {"heads": "16,32,64,128", "s_q": "1,2", "batch": "1,8,32,64,128", "lens": "1024,4096,8192,16384,32768"}
CPU_DEFAULTS = {"heads": "16", "s_q": "1", "batch": "1,4", "lens": "256,1024"}
KINDS = ("fixed", "var")
EVERYONE = "ours,naive,torch_absorbed,torch_chunked,flashmla,fa3,fa3auto,flashinfer"


@app.command()
def kernels(
    heads: Annotated[str, typer.Option(help="Query heads.", show_default=GPU_DEFAULTS["heads"])] = "",
    sq: Annotated[str, typer.Option(help="Query tokens of a request.", show_default=GPU_DEFAULTS["s_q"])] = "",
    batch: Annotated[str, typer.Option(help="Requests.", show_default=GPU_DEFAULTS["batch"])] = "",
    lens: Annotated[str, typer.Option(help="Tokens in the cache.", show_default=GPU_DEFAULTS["lens"])] = "",
    kinds: Annotated[str, typer.Option(help="Lengths of a batch: fixed, var, or both.")] = ",".join(KINDS),
    spread: Annotated[
        float, typer.Option(help="Standard deviation of scores before softmax; more is more peaked.", min=0.01)
    ] = 1.0,
    impls: Annotated[str, typer.Option(help="Who is measured, where it can run.")] = EVERYONE,
    budget: Annotated[float, typer.Option(help="Seconds; shapes that do not fit are left out, and said so.")] = 600,
    output: Annotated[Path, typer.Option("--out", help="The JSON report; a plot of the same name beside it.")] = Path(
        "bench-kernels.json"
    ),
    commit: Annotated[str | None, typer.Option(help="For the report, where git cannot tell.")] = None,
) -> None:
    """Time whole decode calls of one layer, after checking their answers against the oracle.

    On a GPU: CUDA graphs over shuffled pages larger than L2. Without one: a small default grid on the CPU.
    Exit code 1 if our own answers are wrong.
    """
    import torch

    from flashmla_backend.bench import report
    from flashmla_backend.bench.contenders import INVARIANT, OURS
    from flashmla_backend.bench.problems import grid
    from flashmla_backend.bench.provenance import write
    from flashmla_backend.bench.run import run

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    defaults = GPU_DEFAULTS if device.type == "cuda" else CPU_DEFAULTS
    with refusals():
        shapes = grid(
            numbers("heads", heads or defaults["heads"]),
            numbers("sq", sq or defaults["s_q"]),
            numbers("batch", batch or defaults["batch"]),
            numbers("lens", lens or defaults["lens"]),
            choices("kinds", kinds, KINDS),
        )
        with progress_bar() as report_progress:
            results = run(shapes, impls.split(","), device, budget, report_progress, spread)
    made = report.make(results, ["flashmla", *sys.argv[1:]], commit)
    write(made, output)
    present(made, output)
    if {OURS, INVARIANT} & set(results.wrong()):
        err.print("[bold red]our own answers are wrong: see the report's check")
        raise typer.Exit(1)


@app.command()
def show(reports: Annotated[list[Path], typer.Argument(help="JSON reports.", exists=True, dir_okay=False)]) -> None:
    """Print reports and plot them again."""
    from flashmla_backend.bench.offline.cli import present as present_offline
    from flashmla_backend.bench.report import summarise
    from flashmla_backend.bench.serve.cli import present as present_serving
    from flashmla_backend.bench.steps.cli import present as present_steps

    for path in reports:
        made = json.loads(path.read_text())
        if isinstance(made, dict) and "served_by" in made and "rows" in made:
            present_serving(made, path)
        elif isinstance(made, dict) and "deltas" in made:
            present_steps(made, path)
        elif isinstance(made, dict) and "batched_tokens" in made:
            present_offline(made, path)
        elif isinstance(made, dict) and "read_reduce_GBs" in made:
            present({**made, "summary": summarise(made["rows"])}, path)
        else:
            err.print(f"[bold red]{path} is no report of `kernels`, `steps`, `serve` or `offline`", highlight=False)
            raise typer.Exit(2)


def present(made: dict[str, Any], path: Path) -> None:
    from flashmla_backend.bench.plot import plot
    from flashmla_backend.bench.report import summary_line, table
    from flashmla_backend.errors import Unsupported

    out.print(table(made))
    for note in made["notes"]:
        out.print(f"- {note}", highlight=False, markup=False)
    out.print(f"{summary_line(made)}; report: {path}", highlight=False)
    if not made["rows"]:
        return
    try:
        plot(made, path.with_suffix(".png"))
        out.print(f"plot: {path.with_suffix('.png')}", highlight=False)
    except Unsupported as error:
        out.print(f"- {error}", highlight=False, markup=False)


def numbers(name: str, text: str) -> list[int]:
    values = [int(part) if part.strip().isdecimal() else 0 for part in text.split(",")]
    if min(values) < 1:
        raise InvalidArgument(f"{name} is {text!r}; accepted: whole numbers from 1, separated by commas")
    return values


def choices(name: str, text: str, accepted: tuple[str, ...]) -> list[str]:
    values = text.split(",")
    if not set(values) <= set(accepted):
        raise InvalidArgument(f"{name} is {text!r}; accepted: {', '.join(accepted)}, separated by commas")
    return values
