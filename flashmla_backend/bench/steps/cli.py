"""The command `flashmla bench steps`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from flashmla_backend.bench.console import out, progress_bar, refusals, show

ON_GPU = {
    "models": "v3-attention,v2-lite",
    "backends": "ours,FLASHMLA,FLASH_ATTN_MLA,TRITON_MLA",
    "points": "64x512,128x1K,32x8K,8x32K,4x32K+12x8K+16x2K+32x512,2x32K+4x16K+16x8K,4x32K+16x16K+32x8K",
}
ON_CPU = {"models": "tiny", "backends": "ours", "points": "4x128,1x1K+3x64"}


def steps(
    models: Annotated[str, typer.Option(help="Of v2-lite, v3-attention and tiny.", show_default=ON_GPU["models"])] = "",
    backends: Annotated[str, typer.Option(help="ours, and vLLM's own by name.", show_default=ON_GPU["backends"])] = "",
    points: Annotated[
        str, typer.Option(help="Batches as requests x tokens; none: answers alone.", show_default=ON_GPU["points"])
    ] = "",
    dtype: Annotated[str, typer.Option(help="Of model and cache.")] = "bfloat16",
    warmup: Annotated[int, typer.Option(help="Steps before the measured ones.", min=1)] = 8,
    windows: Annotated[int, typer.Option(help="Windows, whose median counts.", min=1)] = 3,
    window: Annotated[int, typer.Option(help="Steps of a window.", min=1)] = 16,
    compared: Annotated[int, typer.Option(help="Requests whose answers are compared.", min=1)] = 32,
    new_tokens: Annotated[int, typer.Option(help="Tokens of each of them.", min=1)] = 16,
    compiled: Annotated[bool, typer.Option(help="With torch.compile, vLLM's default; starts slower.")] = False,
    timeout: Annotated[float, typer.Option(help="Seconds for one model with one backend.")] = 240,
    logs: Annotated[Path, typer.Option(help="Folder for the engines' logs.")] = Path("bench-steps-logs"),
    output: Annotated[Path, typer.Option("--out", help="The JSON report; a plot of the same name beside it.")] = Path(
        "bench-steps.json"
    ),
    commit: Annotated[str | None, typer.Option(help="For the report, where git cannot tell.")] = None,
) -> None:
    """Time decode steps of vLLM, backend by backend, and compare their answers.

    On a GPU under full CUDA graphs; contexts are filled, not prefilled, and answers are given: what
    is compared is how likely the model finds them. Defaults are smaller on a CPU. Exit code 1 if a
    backend failed.
    """
    import torch

    from flashmla_backend.bench import backends as known
    from flashmla_backend.bench.provenance import write
    from flashmla_backend.bench.steps import points as batches
    from flashmla_backend.bench.steps import report
    from flashmla_backend.bench.steps.run import Plan, Results, run

    defaults = ON_GPU if torch.cuda.is_available() else ON_CPU
    with refusals():
        plan = Plan(
            (models or defaults["models"]).split(","),
            known.parse(backends or defaults["backends"]),
            batches.parse(points or defaults["points"]),
            *(dtype, warmup, windows, window, compared, new_tokens, timeout, compiled, logs),
        )

        def report_of(results: Results) -> dict[str, Any]:
            return report.make(results, plan.points, ["flashmla", *sys.argv[1:]], commit)

        with progress_bar() as report_progress:
            results = run(plan, report_progress, lambda so_far: write(report_of(so_far), output))
    present(report_of(results), output)
    if results.notes:
        raise typer.Exit(1)


def present(made: dict[str, Any], path: Path) -> None:
    from flashmla_backend.bench.steps import report
    from flashmla_backend.bench.steps.plot import plot
    from flashmla_backend.errors import Unsupported

    show(report.table(made), report.lines(made), path)
    if not made["rows"]:
        return
    try:
        plot(made, path.with_suffix(".png"))
        out.print(f"plot: {path.with_suffix('.png')}", highlight=False)
    except Unsupported as error:
        out.print(f"- {error}", highlight=False, markup=False)
