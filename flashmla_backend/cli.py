"""The `flashmla` command."""

from __future__ import annotations

import json
from enum import Enum
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.table import Column, Table
from typer.core import TyperCommand

from .bench.cli import app as bench
from .errors import FlashMLAError

if TYPE_CHECKING:
    from .serve import Server

app = typer.Typer(
    name="flashmla",
    help="MLA decode for DeepSeek-V2/V3-class models, as a backend of vLLM and SGLang.",
    no_args_is_help=True,
    add_completion=False,
)
app.add_typer(bench, name="bench")
out, err = Console(), Console(stderr=True)
MARKS = {"ok": "[green]ok[/]", "note": "[yellow]note[/]", "missing": "[red]missing[/]"}


class Engine(str, Enum):
    vllm = "vllm"
    sglang = "sglang"


class WithEngineArguments(TyperCommand):
    """Keeps what follows `--` apart, so that it goes to the engine and its first word is not taken for MODEL."""

    def parse_args(self, ctx: typer.Context, args: list[str]) -> list[str]:  # type: ignore[override]
        cut = args.index("--") if "--" in args else len(args)
        ctx.meta["engine_arguments"] = args[cut + 1 :]
        return super().parse_args(ctx, args[:cut])


def _print_version(wanted: bool) -> None:
    if wanted:
        out.print(version("flashmla_backend"))
        raise typer.Exit


@app.callback()
def main(
    _: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


@app.command()
def doctor(as_json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON.")] = False) -> None:
    """Say what is here, what will serve, what is missing and how to get it.

    Exit code 0 if `flashmla serve` will work with our backend, 1 if not.
    """
    from .doctor import examine

    with err.status("Asking which backend would serve"):
        report = examine()
    if as_json:
        typer.echo(json.dumps(report.as_dict(), indent=2))
    else:
        title = f"flashmla_backend {version('flashmla_backend')}"
        table = Table("", "what", Column("found", overflow="fold"), title=title)
        for finding in report.findings:
            lines = [escape(finding.found)] + ([f"[bold]-> {escape(finding.remedy)}[/]"] if finding.remedy else [])
            table.add_row(MARKS[finding.verdict], escape(finding.subject), "\n".join(lines))
        out.print(table)
        will = f"works: {report.decode_path}" if report.will_serve else "does not work yet: see what is missing"
        out.print(f"[bold]flashmla serve {will}[/]")
    raise typer.Exit(0 if report.will_serve else 1)


@app.command(cls=WithEngineArguments, epilog="Everything after -- goes to the engine as it is.")
def serve(
    ctx: typer.Context,
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="[MODEL] [-- ENGINE_ARGUMENTS...]",
            help="Folder or name of a model with MLA. Without it: the embedded default.",
        ),
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on.", min=1, max=65535)] = 8000,
    name: Annotated[
        str | None,
        typer.Option(help="Name that requests give for the model. Default: MODEL as given, or flashmla-default."),
    ] = None,
    engine: Annotated[
        Engine | None, typer.Option(help="Default: vllm, or sglang where only that is installed.", show_default=False)
    ] = None,
) -> None:
    """Start an engine's OpenAI-compatible server with --attention-backend flashmla.

    Without MODEL it serves the embedded default: a small DeepSeek-V2 mixture of experts with random weights, made on
    first use. It shows the whole path at work, and talks nonsense.
    """
    from . import serve as serving

    arguments = ctx.meta["engine_arguments"]
    try:
        serving.check_port(host, port)
        make_server = _sglang_server if (engine or _installed_engine()) is Engine.sglang else _vllm_server
        server = make_server(model, name, host, port, arguments)
    except FlashMLAError as refusal:
        err.print(f"[red]flashmla serve:[/] {escape(str(refusal))}", soft_wrap=True)
        raise typer.Exit(2) from None
    raise typer.Exit(serving.run(server, say=_say))


def _installed_engine() -> Engine:
    from . import doctor, sglang_engine

    only_sglang = doctor.vllm_distribution() is None and sglang_engine.distribution() is not None
    return Engine.sglang if only_sglang else Engine.vllm


def _vllm_server(model: str | None, name: str | None, host: str, port: int, arguments: list[str]) -> Server:
    from . import serve as serving

    serving.check_vllm()
    if model is not None:
        return serving.Server(model, name or model, host, port, arguments)
    chosen = [*serving.DEFAULT_MODEL_ARGUMENTS, *arguments]
    gib = serving.DEFAULT_MODEL_KV_CACHE_GIB
    return serving.Server(str(_default_checkpoint()), name or serving.DEFAULT_NAME, host, port, chosen, gib)


def _sglang_server(model: str | None, name: str | None, host: str, port: int, arguments: list[str]) -> Server:
    from . import serve as serving
    from . import sglang_engine

    sglang_engine.check_installed()
    if model is not None:
        return sglang_engine.SglangServer(model, name or model, host, port, arguments)
    chosen = [*sglang_engine.default_model_arguments(), *arguments]
    return sglang_engine.SglangServer(str(_default_checkpoint()), name or serving.DEFAULT_NAME, host, port, chosen)


def _say(message: str) -> None:
    """Apart from the server's log, and unwrapped so that it can be pasted."""
    out.print()
    out.print(escape(message), style="bold", soft_wrap=True, highlight=False)
    out.print()


def _default_checkpoint() -> Path:
    from .checkpoint import default_checkpoint

    columns = TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn()
    with Progress(*columns, console=err) as bar:
        task = bar.add_task("Making the embedded checkpoint", visible=False)

        def advance(made: int, total: int) -> None:
            bar.update(task, completed=made, total=total, visible=True)

        folder = default_checkpoint(progress=advance)
    err.print(f"Embedded checkpoint: {folder}", soft_wrap=True, highlight=False)
    return folder
