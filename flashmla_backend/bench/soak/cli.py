"""The command `flashmla bench soak`."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from flashmla_backend.bench.console import err, out, refusals
from flashmla_backend.errors import InvalidArgument

GROWTH_MIB, GROWTH_MIB_ON_CPU = 64, 1024  # oneDNN keeps a kernel for every shape of batch it has seen
CROWDING = 8  # by default the cache holds this part of what all clients could need


def soak(
    seconds: Annotated[float, typer.Option(help="Of load, the server's start not counted.", min=1)] = 600,
    phase: Annotated[float, typer.Option(help="Seconds of load between two canaries.", min=1)] = 10,
    model: Annotated[str, typer.Option(help="embedded, or a folder with the embedded tokenizer.")] = "embedded",
    dtype: Annotated[str, typer.Option(help="Of model and cache.")] = "bfloat16",
    clients: Annotated[int, typer.Option(help="Requests at once.", min=1)] = 16,
    longest: Annotated[int, typer.Option(help="Tokens of a prompt and its answer.", min=200)] = 1024,
    blocks: Annotated[int, typer.Option(help="Of 64 tokens in the cache.", show_default="too few for all clients")] = 0,
    drafts: Annotated[int, typer.Option(help="Tokens that n-gram speculation guesses.", min=1, max=7)] = 3,
    growth: Annotated[
        float | None, typer.Option(help="MiB that memory may grow after the first third.", show_default=str(GROWTH_MIB))
    ] = None,
    timeout: Annotated[float, typer.Option(help="Seconds for the server's start.", min=1)] = 240,
    server_arguments: Annotated[str, typer.Option(help="More arguments of vLLM's server, quoted as one.")] = "",
    logs: Annotated[Path, typer.Option(help="Folder for the server's log.")] = Path("bench-soak-logs"),
    output: Annotated[Path, typer.Option("--out", help="The JSON summary.")] = Path("bench-soak.json"),
    commit: Annotated[str | None, typer.Option(help="For the summary, where git cannot tell.")] = None,
) -> None:
    """Keep a server under mixed load over HTTP, and see that nothing fails, drifts or grows.

    Ragged prompts, streams, cancellations, shared prefixes, preemption, n-gram speculation; and a canary prompt whose
    greedy answer, alone in its batch, must stay the same to the last bit. Exit code 1 if the soak failed.
    """
    import torch

    from flashmla_backend.bench.provenance import write
    from flashmla_backend.bench.soak.run import Plan, failures, least_blocks, run
    from flashmla_backend.serve import check_vllm

    least = least_blocks(longest)
    if growth is None:
        growth = GROWTH_MIB if torch.cuda.is_available() else GROWTH_MIB_ON_CPU
    chosen = blocks or max(least, clients * least // CROWDING)
    with refusals():
        check_vllm()
        if chosen < least:
            raise InvalidArgument(f"blocks is {blocks}; {longest} tokens need {least} or more")
        plan = Plan(
            *(model, dtype, seconds, phase, clients, longest, chosen, drafts, growth, timeout, logs),
            shlex.split(server_arguments),
        )

        def summary_of(results: Any) -> dict[str, Any]:
            return _summary(plan, results, failures(plan, results), ["flashmla", *sys.argv[1:]], commit)

        columns = TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn()
        with Progress(*columns, console=err) as progress:
            task = progress.add_task("starting", total=seconds)
            results = run(
                plan,
                lambda done, what: progress.update(task, completed=done, description=what),
                lambda so_far: write(summary_of(so_far), output),
            )
    made = summary_of(results)
    for line in _lines(made):
        out.print(line, highlight=False, markup=False)
    out.print(f"report: {output}", highlight=False)
    if made["failures"]:
        raise typer.Exit(1)


def _summary(plan: Any, results: Any, failed: list[str], command: Sequence[str], commit: str | None) -> dict[str, Any]:
    import torch

    from flashmla_backend.bench import machine
    from flashmla_backend.bench.provenance import provenance
    from flashmla_backend.bench.soak.run import growths
    from flashmla_backend.bench.steps.run import vllm_version

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return {
        **provenance(machine.describe(device)[0], command, commit),
        "vllm": vllm_version(),
        "served_by": results.served_by,
        "model": plan.model,
        "dtype": plan.dtype,
        "clients": plan.clients,
        "longest": plan.longest,
        "blocks": plan.blocks,
        "drafts": plan.drafts,
        "seconds": round(results.seconds, 1),
        "answered": dict(results.tally.answered),
        "failed": results.tally.failed,
        "tokens": results.tally.tokens,
        "canaries": {"asked": len(results.canaries), "different": len(set(results.canaries))},
        "counters": results.counters,
        "growth": growths(results),
        "memory": results.memory,
        "failures": failed,
    }


def _lines(made: dict[str, Any]) -> list[str]:
    counters = {name: int(value) for name, value in made["counters"].items()}
    return [
        f"{made['device']}, {made['vllm']}; {made['served_by']}",
        f"{made['seconds']:.0f} s, {made['clients']} clients, a cache of {made['blocks']} blocks: "
        f"{sum(made['answered'].values())} requests, {made['failed']} failed, {made['tokens']} tokens read",
        ", ".join(f"{count} {kind}" for kind, count in made["answered"].items()),
        ", ".join(f"{value} {name}" for name, value in counters.items()),
        f"canary: {made['canaries']['asked']} times, {made['canaries']['different']} different answers",
        ", ".join(f"{where} {growth:+.1f}" for where, growth in made["growth"].items()) + " after the first third",
        *(f"FAILED: {failure}" for failure in made["failures"]),
    ]
