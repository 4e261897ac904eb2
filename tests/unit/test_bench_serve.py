"""`flashmla bench serve` without a server: loads, models, what is kept of a result, and what is concluded."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from flashmla_backend.bench.backends import OURS
from flashmla_backend.bench.serve import models, report
from flashmla_backend.bench.serve import run as runs
from flashmla_backend.bench.serve.engine import who_serves
from flashmla_backend.bench.serve.engines import ENGINES
from flashmla_backend.bench.serve.loads import Load, make_loads
from flashmla_backend.bench.serve.measured import METRICS, PERCENTILES, digest, medians
from flashmla_backend.bench.serve.plan import Plan
from flashmla_backend.bench.serve.run import Results
from flashmla_backend.bench.servers import HttpServer, ServerFailed, free_port, running
from flashmla_backend.bench.vllm_server import vllm_server
from flashmla_backend.cli import app
from flashmla_backend.errors import InvalidArgument


def test_loads() -> None:
    assert make_loads("0.5,4", "1,16", seconds=10, rounds=3) == [
        Load("rate", 0.5, 5),
        Load("rate", 4, 40),
        Load("concurrency", 1, 3),
        Load("concurrency", 16, 48),
    ]
    assert [load.name for load in make_loads("0.5", "16", 1, 1)] == ["0.5/s", "16 at once"]
    assert make_loads("0.5", "", 1, 1)[0].prompts == 4
    assert Load("rate", 4, 40).arguments() == ["--num-prompts", "40", "--request-rate", "4"]
    assert Load("concurrency", 16, 48).arguments()[-2:] == ["--max-concurrency", "16"]


@pytest.mark.parametrize(
    ("rates", "concurrency", "said"),
    [
        ("4,x", "", "rates is '4,x'; accepted: positive numbers"),
        ("inf", "", "rates is 'inf'"),
        ("", "0", "concurrency is '0'"),
        ("", "1.5", "concurrency has 1.5; accepted: whole numbers"),
        ("", "", "both empty"),
    ],
)
def test_loads_that_are_none(rates: str, concurrency: str, said: str) -> None:
    with pytest.raises(InvalidArgument, match=said):
        make_loads(rates, concurrency, 1, 1)


def test_models(tmp_path: Path) -> None:
    folder, arguments = models.resolve("v2-lite", "bfloat16", 70000, tmp_path)
    assert json.loads((folder / "config.json").read_text())["max_position_embeddings"] == 70000
    assert (folder / "tokenizer.json").is_file() and arguments == ["--load-format", "dummy"]
    assert models.resolve(str(folder), "bfloat16", 1, tmp_path) == (folder, [])
    with pytest.raises(InvalidArgument, match="model is 'v4'; accepted: embedded, v2-lite, v3-attention, or a folder"):
        models.resolve("v4", "bfloat16", 1, tmp_path)


def test_a_backend_is_selected_by_argument_and_environment(tmp_path: Path) -> None:
    ours = vllm_server(tmp_path, OURS, ["--seed", "0"], tmp_path / "log")
    theirs = vllm_server(tmp_path, "TRITON_MLA", [], tmp_path / "log")
    selected = [server.command[server.command.index("--attention-backend") + 1] for server in (ours, theirs)]
    assert selected == ["FLASHMLA", "TRITON_MLA"] and ours.command[-2:] == ["--seed", "0"]
    assert [server.environment["FLASHMLA_BACKEND_DISABLE"] for server in (ours, theirs)] == ["0", "1"]


def test_the_log_must_name_the_backend(tmp_path: Path) -> None:
    log, vllm = tmp_path / "log", ENGINES["vllm"]
    log.write_text("x Using CPU_MLA backend.\nINFO flashmla_backend 0.1.0 serves MLA decode: our kernels\n")
    assert who_serves(vllm, OURS, log) == "flashmla_backend 0.1.0 serves MLA decode: our kernels"
    with pytest.raises(ServerFailed, match="asked for FLASHMLA, and the log says: flashmla_backend"):
        who_serves(vllm, "FLASHMLA", log)
    log.write_text("x Using FLASHMLA attention backend out of potential backends\n")
    assert who_serves(vllm, "FLASHMLA", log).startswith("Using FLASHMLA")
    with pytest.raises(ServerFailed, match="asked for ours"):
        who_serves(vllm, OURS, log)
    log.write_text("server_args=ServerArgs(decode_attention_backend='no', attention_backend='triton', x=1)")
    assert who_serves(ENGINES["sglang"], "triton", log) == "attention_backend='triton'"


def plan_of(folder: Path, **changes: Any) -> Plan:
    made: dict[str, Any] = {"model": "v2-lite", "backends": [OURS, "FLASHMLA"], "loads": make_loads("2", "4", 2, 1)}
    made |= {"turns": 1, "dtype": "bfloat16", "input_tokens": 10, "output_tokens": 5, "spread": 0.0, "compiled": False}
    return Plan(**made | {"timeout_s": 1, "logs": folder, "server_arguments": []} | changes)


def option(arguments: list[str], name: str) -> str:
    return arguments[arguments.index(name) + 1]


@pytest.mark.parametrize(
    ("engine", "ours", "own"), [("vllm", "FLASHMLA", "FLASHMLA"), ("sglang", "flashmla", "triton")]
)
def test_engines_start_what_was_asked_for(engine: str, ours: str, own: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    plan = plan_of(tmp_path, server_arguments=["--more", "1"])
    for backend, selected, disabled in ((OURS, ours, "0"), (own, own, "1")):
        server = ENGINES[engine].server(plan, tmp_path, backend, tmp_path / "log")
        assert option(server.command, "--attention-backend") == selected
        assert server.environment["FLASHMLA_BACKEND_DISABLE"] == disabled
        assert server.command[-2:] == ["--more", "1"]


def test_sglangs_generator_draws_the_same_lengths(tmp_path: Path) -> None:
    """It draws from a part of the longest to the longest, vLLM's around the mean."""
    plan = plan_of(tmp_path, input_tokens=100, output_tokens=40, spread=0.5)
    server = HttpServer([], {}, "http://127.0.0.1:1", tmp_path / "log")
    load = make_loads("", "8", 1, 2)[0]
    made = ENGINES["sglang"].load_arguments(plan, load, tmp_path, server, tmp_path / "result")
    longest, part = int(option(made, "--random-input-len")), float(option(made, "--random-range-ratio"))
    assert (longest, round(longest * part)) == (150, 50) and option(made, "--random-output-len") == "60"
    assert option(made, "--num-prompts") == "16" and option(made, "--max-concurrency") == "8"


def test_sglangs_result_is_reported_as_vllms() -> None:
    expected = result(2)
    of_sglang = {"total_throughput": expected["total_token_throughput"], "server_info": {"a": 1}}
    for key, value in expected.items():
        of_sglang[key.replace("p50_", "median_").replace("e2el", "e2e_latency")] = value
    del of_sglang["total_token_throughput"]
    assert ENGINES["sglang"].digest(json.dumps(of_sglang)) == digest(expected)


def test_a_server_that_dies_or_does_not_answer(tmp_path: Path) -> None:
    def server(code: str) -> HttpServer:
        return HttpServer([sys.executable, "-c", code], {}, f"http://127.0.0.1:{free_port()}", tmp_path / "log")

    with (
        pytest.raises(ServerFailed, match=r"ended with code 3 (?s:.*)no such model"),
        running(server("print('no such model', flush=True); raise SystemExit(3)"), 60),
    ):
        pass
    with pytest.raises(ServerFailed, match="not up after 1 s"), running(server("import time; time.sleep(60)"), 1):
        pass


def result(scale: float) -> dict[str, Any]:
    """As vLLM's generator saves it."""
    made: dict[str, Any] = {"completed": 4, "total_input_tokens": 40, "total_output_tokens": 20, "duration": 1.0}
    made |= {"request_throughput": 4 / scale, "output_throughput": 20 / scale, "total_token_throughput": 60 / scale}
    for metric in METRICS:
        made |= {f"mean_{metric}_ms": scale} | {f"p{which}_{metric}_ms": scale for which in PERCENTILES}
    return made


def play(monkeypatch: pytest.MonkeyPatch, *scales: Sequence[float]) -> list[str]:
    """Instead of servers: one after the other gives results of these scales, load by load. Where there are too few the
    load stops, and without any the server does not come up. Returns who has been started."""
    started: list[str] = []

    @contextmanager
    def up(server: HttpServer, start_seconds: float) -> Iterator[None]:
        ours = server.environment["FLASHMLA_BACKEND_DISABLE"] == "0"
        started.append(OURS if ours else "FLASHMLA")
        assert not server.log.exists(), "or what another server said is lost"
        server.log.write_text("flashmla_backend 1 serves MLA decode" if ours else "Using FLASHMLA backend.")
        if not scales[len(started) - 1]:
            raise ServerFailed("no memory")
        yield

    def load(arguments: list[str], environment: object, log: Path, timeout_s: float, progressed: object) -> int:
        assert not log.exists(), "or what another load said is lost"
        log.write_text("stopped")
        path = Path(arguments[1])
        asked, found = json.loads(path.read_text()).values(), scales[len(started) - 1]
        for one, scale in zip(asked, found, strict=False):
            (path.parent / option(one, "--result-filename")).write_text(json.dumps(result(scale)))
        return int(len(found) < len(asked))

    monkeypatch.setattr(runs, "running", up)
    monkeypatch.setattr(runs, "run_child", load)
    return started


def played(plan: Plan) -> tuple[dict[str, Any], list[int]]:
    """The report, and how many results of ours for the first load there were at each `keep`."""
    kept: list[int] = []

    def keep(so_far: Results) -> None:
        made = report.make(so_far, ENGINES["vllm"], plan, ["flashmla"], "abc")["rows"][0]
        kept.append(len(made.get(OURS, {}).get("turns", [])))

    results = runs.run(ENGINES["vllm"], plan, lambda done, of, what: None, keep)
    return report.make(results, ENGINES["vllm"], plan, ["flashmla"], "abc"), kept


def test_one_turn_is_reported_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started = play(monkeypatch, (2.0, 3.0), ())
    made, _ = played(plan_of(tmp_path))
    assert started == [OURS, "FLASHMLA"]
    assert made["rows"] == [
        {"load": "2/s", "kind": "rate", "value": 2, "prompts": 4, OURS: digest(result(2.0))},
        {"load": "4 at once", "kind": "concurrency", "value": 4, "prompts": 4, OURS: digest(result(3.0))},
    ]
    assert made["notes"] == ["FLASHMLA: no memory"]
    assert "medians" not in str(report.lines(made))


def test_turns_go_back_and_forth_and_their_medians_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = [(40.0, 1.0), (2.0, 5.0), (4.0, 6.0)], [(8.0, 6.0), (5.0, 3.0), (6.0, 30.0)]
    started = play(monkeypatch, ours[0], theirs[0], theirs[1], ours[1], ours[2], theirs[2])
    made, kept = played(plan_of(tmp_path, turns=3))
    assert started == [OURS, "FLASHMLA", "FLASHMLA", OURS, OURS, "FLASHMLA"]
    assert kept == [1, 1, 1, 2, 3, 3], "after each server, with what is known by then"
    for row, own, other in zip(made["rows"], (4.0, 5.0), (6.0, 6.0), strict=True):
        for who, scale in ((OURS, own), ("FLASHMLA", other)):
            assert {key: value for key, value in row[who].items() if key != "turns"} == digest(result(scale))
    assert [(one["turn"], one["tpot_ms"]["p99"]) for one in made["rows"][0][OURS]["turns"]] == [(1, 40), (2, 2), (3, 4)]
    assert made["summary"]["tpot"]["min"] == 1.2 and made["notes"] == []
    assert report.lines(made)[0] == "turns of a backend, whose medians these are: 3"


def test_of_two_turns_the_mean_counts_and_counts_stay_whole() -> None:
    first, second = digest(result(2.0)), digest({**result(3.0), "completed": 3})
    found = medians([first, second])
    assert found["tpot_ms"] == dict.fromkeys(found["tpot_ms"], 2.5)
    assert found["output_throughput"] == pytest.approx((10 + 20 / 3) / 2, abs=1e-4)
    assert (found["completed"], found["total_output_tokens"]) == (3, 20)


def test_a_failed_turn_is_noted_and_the_others_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    play(monkeypatch, (), (8.0,), (6.0, 4.0), (2.0, 3.0))
    made, _ = played(plan_of(tmp_path, turns=2, loads=[Load("rate", 2, 4), Load("concurrency", 4, 9)]))
    first, second = made["rows"]
    assert (first[OURS]["tpot_ms"]["p50"], first["FLASHMLA"]["tpot_ms"]["p50"]) == (2, 7)
    assert (second[OURS]["tpot_ms"]["p50"], second["FLASHMLA"]["tpot_ms"]["p50"]) == (3, 4)
    turns = [[one["turn"] for one in row[who]["turns"]] for row in (first, second) for who in (OURS, "FLASHMLA")]
    assert turns == [[2], [1, 2], [2], [2]]
    assert report.lines(made)[0] == "turns of a backend, whose medians these are: 1 or 2"
    assert made["notes"] == [
        "ours, turn 1: no memory",
        f"FLASHMLA, turn 1: the load ended with code 1 ({tmp_path / 'load-FLASHMLA-1.log'}):\nstopped",
        "FLASHMLA, turn 2, 4 at once: 4 of 9 requests completed",
        "ours, turn 2, 4 at once: 4 of 9 requests completed",
    ]


def test_report(tmp_path: Path) -> None:
    ours, flashmla, triton = digest(result(2)), digest(result(3)), digest(result(8))
    measured = {
        OURS: {"2/s": {1: ours}, "4 at once": {1: ours}},
        "FLASHMLA": {"2/s": {1: flashmla}, "4 at once": {1: digest(result(1.5))}},
        "TRITON_MLA": {"2/s": {1: triton}},
    }
    results = Results(measured, {OURS: "flashmla_backend serves"}, ["a note"])
    made = json.loads(
        json.dumps(report.make(results, ENGINES["vllm"], plan_of(tmp_path), ["flashmla", "bench", "serve"], "abc"))
    )
    assert [report.gains(row)["tpot"] for row in made["rows"]] == [1.5, 0.75]
    for gained in made["summary"].values():
        assert gained == {"geomean": pytest.approx(1.125**0.5, abs=1e-3), "min": 0.75, "n": 2}
    console = Console(width=200, file=io.StringIO())
    console.print(report.table(made))
    console.print("\n".join(report.lines(made)))
    for part in ("4 at once", "TRITON_MLA", "flashmla_backend serves", "least 0.750", "a note"):
        assert part in console.file.getvalue()
    (tmp_path / "serve.json").write_text(json.dumps(made))
    shown = CliRunner().invoke(app, ["bench", "show", str(tmp_path / "serve.json")])
    assert shown.exit_code == 0, shown.output
    assert "v2-lite" in shown.output
    assert (tmp_path / "serve.png").stat().st_size > 10000


def test_refusals_are_said_before_anything_starts() -> None:
    said = CliRunner().invoke(app, ["bench", "serve", "--rates", "fast"])
    assert said.exit_code == 2 and "rates is 'fast'" in said.output
    said = CliRunner().invoke(app, ["bench", "serve", "--engine", "llama"])
    assert said.exit_code == 2 and "engine is 'llama'; accepted: vllm, sglang" in said.output
