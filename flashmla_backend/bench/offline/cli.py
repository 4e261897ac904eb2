"""The command `flashmla bench offline`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from flashmla_backend.bench.console import progress_bar, refusals, show

ON_GPU = {
    "model": "v2-lite",
    "backends": "ours,FLASHMLA,FLASH_ATTN_MLA",
    "prompts": "256",
    "input": "1024",
    "output": "128",
    "at_once": "64",
}
ON_CPU = {"model": "tiny", "backends": "ours", "prompts": "8", "input": "64", "output": "16", "at_once": "4"}


def offline(
    model: Annotated[str, typer.Option(help="v2-lite, v3-attention or tiny.", show_default=ON_GPU["model"])] = "",
    backends: Annotated[str, typer.Option(help="ours, and vLLM's own by name.", show_default=ON_GPU["backends"])] = "",
    prompts: Annotated[int | None, typer.Option(help="Of a round.", show_default=ON_GPU["prompts"], min=1)] = None,
    input_tokens: Annotated[int | None, typer.Option(help="Of a prompt.", show_default=ON_GPU["input"], min=1)] = None,
    output_tokens: Annotated[
        int | None, typer.Option(help="Of an answer.", show_default=ON_GPU["output"], min=1)
    ] = None,
    spread: Annotated[float, typer.Option(help="Of both lengths, as a part of them.", min=0, max=0.99)] = 0.5,
    at_once: Annotated[
        int | None, typer.Option(help="Requests in a step, at most.", show_default=ON_GPU["at_once"], min=1)
    ] = None,
    batched_tokens: Annotated[
        int | None,
        typer.Option(help="Tokens in a step, at most; small ones make most steps mixed.", show_default="vLLM's", min=1),
    ] = None,
    rounds: Annotated[int, typer.Option(help="Of one process, after one that is not measured.", min=1)] = 3,
    turns: Annotated[
        int,
        typer.Option(
            help="Processes of each backend, every other turn backwards; with one, the first meets cold caches.", min=1
        ),
    ] = 1,
    dtype: Annotated[str, typer.Option(help="Of model and cache.")] = "bfloat16",
    compiled: Annotated[bool, typer.Option(help="With torch.compile, vLLM's default; starts slower.")] = False,
    timeout: Annotated[float, typer.Option(help="Seconds for one process.", min=1)] = 300,
    logs: Annotated[Path, typer.Option(help="Folder for the engines' logs.")] = Path("bench-offline-logs"),
    output: Annotated[Path, typer.Option("--out", help="The JSON report.")] = Path("bench-offline.json"),
    commit: Annotated[str | None, typer.Option(help="For the report, where git cannot tell.")] = None,
) -> None:
    """Hand vLLM a batch of prompts without a server, backend by backend: throughput.

    Prompts and decodes share steps; says how long those take and those of decodes alone. On a GPU
    decodes alone run under full CUDA graphs, steps with prompts under none, and without --compiled
    both without torch.compile: not what vLLM does by default. Defaults are smaller on a CPU. Exit
    code 1 if a backend failed.
    """
    import torch

    from flashmla_backend import serve
    from flashmla_backend.bench import backends as known
    from flashmla_backend.bench.offline import report
    from flashmla_backend.bench.offline.run import Plan, Results, run
    from flashmla_backend.bench.provenance import write

    defaults = ON_GPU if torch.cuda.is_available() else ON_CPU
    with refusals():
        plan = Plan(
            model=model or defaults["model"],
            backends=known.parse(backends or defaults["backends"]),
            prompts=prompts or int(defaults["prompts"]),
            input_tokens=input_tokens or int(defaults["input"]),
            output_tokens=output_tokens or int(defaults["output"]),
            spread=spread,
            at_once=at_once or int(defaults["at_once"]),
            batched_tokens=batched_tokens,
            rounds=rounds,
            turns=turns,
            dtype=dtype,
            compiled=compiled,
            timeout_s=timeout,
            logs=logs,
        )
        serve.check_vllm()

        def report_of(results: Results) -> dict[str, Any]:
            return report.make(results, plan, ["flashmla", *sys.argv[1:]], commit)

        with progress_bar() as report_progress:
            results = run(plan, report_progress, lambda so_far: write(report_of(so_far), output))
    present(report_of(results), output)
    if results.notes:
        raise typer.Exit(1)


def present(made: dict[str, Any], path: Path) -> None:
    """A report as a table."""
    from flashmla_backend.bench.offline import report

    show(report.table(made), report.lines(made), path)
