"""The command `flashmla bench serve`."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from flashmla_backend.bench.console import progress_bar, refusals, show
from flashmla_backend.errors import Unsupported

ON_GPU = {
    "model": "v2-lite",
    "rates": "4,16",
    "concurrency": "1,16,64",
    "input": "1024",
    "output": "128",
}
ON_CPU = {"model": "embedded", "rates": "1", "concurrency": "1,4", "input": "64", "output": "16"}


def serve(
    model: Annotated[
        str,
        typer.Option(
            help="v2-lite or v3-attention (weights made up), embedded, or a folder.", show_default=ON_GPU["model"]
        ),
    ] = "",
    engine: Annotated[str, typer.Option(help="vllm or sglang.")] = "vllm",
    backends: Annotated[
        str,
        typer.Option(help="ours, and the engine's own.", show_default="ours,FLASHMLA,FLASH_ATTN_MLA; ours,triton"),
    ] = "",
    rates: Annotated[str | None, typer.Option(help="Requests a second.", show_default=ON_GPU["rates"])] = None,
    concurrency: Annotated[
        str | None, typer.Option(help="Requests at once.", show_default=ON_GPU["concurrency"])
    ] = None,
    seconds: Annotated[float, typer.Option(help="How long requests arrive at each rate.", min=1)] = 10,
    rounds: Annotated[int, typer.Option(help="Prompts are so many times the requests at once.", min=1)] = 3,
    turns: Annotated[
        int,
        typer.Option(
            help="Servers of each backend, every other turn backwards; with one, the first meets cold caches.", min=1
        ),
    ] = 1,
    input_tokens: Annotated[int, typer.Option(help="Of a prompt.", show_default=ON_GPU["input"], min=0)] = 0,
    output_tokens: Annotated[int, typer.Option(help="Of an answer.", show_default=ON_GPU["output"], min=0)] = 0,
    spread: Annotated[float, typer.Option(help="Of both lengths, as a part of them.", min=0, max=0.99)] = 0.0,
    dtype: Annotated[str, typer.Option(help="Of model and cache.")] = "bfloat16",
    compiled: Annotated[bool, typer.Option(help="With torch.compile, which starts slower.")] = False,
    server_arguments: Annotated[str, typer.Option(help="More arguments of the server, quoted as one.")] = "",
    timeout: Annotated[float, typer.Option(help="Seconds for one server, its start included.", min=1)] = 300,
    logs: Annotated[Path, typer.Option(help="Folder for the logs of servers and loads.")] = Path("bench-serve-logs"),
    output: Annotated[Path, typer.Option("--out", help="The JSON report; a plot of the same name beside it.")] = Path(
        "bench-serve.json"
    ),
    commit: Annotated[str | None, typer.Option(help="For the report, where git cannot tell.")] = None,
) -> None:
    """Serve over HTTP with each backend, and load it with the engine's own generator.

    Times to the first token and per further token, and throughput, at several rates and numbers of requests at once;
    of several turns, the medians. Defaults are smaller on a CPU. Exit code 1 if a backend or a request failed.
    """
    import torch

    from flashmla_backend.bench import backends as known
    from flashmla_backend.bench.provenance import write
    from flashmla_backend.bench.serve import report
    from flashmla_backend.bench.serve.engines import engine_named
    from flashmla_backend.bench.serve.loads import make_loads
    from flashmla_backend.bench.serve.plan import Plan
    from flashmla_backend.bench.serve.run import Results, run

    on_gpu = torch.cuda.is_available()
    defaults = ON_GPU if on_gpu else ON_CPU
    with refusals():
        serving = engine_named(engine)
        serving.check_installed()
        plan = Plan(
            model=model or defaults["model"],
            backends=known.parse(backends or (serving.on_gpu if on_gpu else known.OURS), serving.backends),
            loads=make_loads(
                defaults["rates"] if rates is None else rates,
                defaults["concurrency"] if concurrency is None else concurrency,
                seconds,
                rounds,
            ),
            turns=turns,
            dtype=dtype,
            input_tokens=input_tokens or int(defaults["input"]),
            output_tokens=output_tokens or int(defaults["output"]),
            spread=spread,
            compiled=compiled,
            timeout_s=timeout,
            logs=logs,
            server_arguments=shlex.split(server_arguments),
        )

        def report_of(results: Results) -> dict[str, Any]:
            return report.make(results, serving, plan, ["flashmla", *sys.argv[1:]], commit)

        with progress_bar() as report_progress:
            results = run(serving, plan, report_progress, lambda so_far: write(report_of(so_far), output))
    present(report_of(results), output)
    if results.notes:
        raise typer.Exit(1)


def present(made: dict[str, Any], path: Path) -> None:
    """A report as a table, and as a plot beside it."""
    from flashmla_backend.bench.serve import report
    from flashmla_backend.bench.serve.plot import plot

    said = report.lines(made)
    try:
        plot(made, path.with_suffix(".png"))
        said.append(f"plot: {path.with_suffix('.png')}")
    except Unsupported as error:
        said.append(str(error))
    show(report.table(made), said, path)
