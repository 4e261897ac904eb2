"""`flashmla bench offline` without an engine: the job, the clock of its steps, and what is concluded."""

from __future__ import annotations

import json
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from flashmla_backend.bench.backends import OURS
from flashmla_backend.bench.child import ask_child
from flashmla_backend.bench.execution import engine_arguments
from flashmla_backend.bench.offline import clock as clocks
from flashmla_backend.bench.offline import report
from flashmla_backend.bench.offline import run as runs
from flashmla_backend.bench.offline.job import draw_lengths, draw_prompts
from flashmla_backend.bench.offline.run import Plan, Results
from flashmla_backend.bench.turns import in_turns
from flashmla_backend.cli import app
from flashmla_backend.errors import InvalidArgument


def plan_of(folder: Path, **changes: Any) -> Plan:
    made: dict[str, Any] = {"model": "tiny", "backends": [OURS, "FLASHMLA"], "prompts": 4, "input_tokens": 50}
    made |= {"output_tokens": 25, "spread": 0.0, "at_once": 2, "batched_tokens": None, "rounds": 2, "turns": 1}
    return Plan(**made | {"dtype": "bfloat16", "compiled": False, "timeout_s": 1, "logs": folder} | changes)


def test_lengths_and_prompts() -> None:
    assert draw_lengths(3, 50, 25, 0.0) == [(50, 25)] * 3
    drawn = draw_lengths(2000, 100, 40, 0.5)
    assert drawn == draw_lengths(2000, 100, 40, 0.5)
    for index, mean in enumerate((100, 40)):
        lengths = [pair[index] for pair in drawn]
        assert (min(lengths), max(lengths)) == (mean / 2, mean * 1.5)
        assert sum(lengths) / len(lengths) == pytest.approx(mean, rel=0.03)
    assert min(tokens for pair in draw_lengths(100, 1, 1, 0.99) for tokens in pair) == 1
    first, again, other = (draw_prompts([5, 300], 7, seed) for seed in (1, 1, 2))
    assert first == again != other
    assert [len(ids) for ids in first] == [5, 300] and set(first[1]) == set(range(7))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model": "v4"}, "model is 'v4'; accepted: v2-lite, v3-attention, tiny"),
        ({"batched_tokens": 1}, "batched-tokens is 1; accepted: at least at-once, which is 2"),
    ],
)
def test_plans_that_are_none(changes: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match=said):
        plan_of(tmp_path, **changes)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--model", "v4"], "model is 'v4'"),
        (["--backends", "ours,flashinfer"], "backends has 'flashinfer'"),
        (["--at-once", "9", "--batched-tokens", "8"], "batched-tokens is 8; accepted: at least at-once, which is 9"),
        (["--prompts", "0"], "Invalid value for '--prompts'"),
    ],
)
def test_arguments_that_are_none(arguments: list[str], said: str) -> None:
    result = CliRunner().invoke(app, ["bench", "offline", *arguments])
    assert result.exit_code == 2 and said in " ".join(result.output.split())


def test_every_other_turn_goes_backwards() -> None:
    turns = in_turns([OURS, "FLASHMLA"], 3)
    assert [who for _, who in turns] == [OURS, "FLASHMLA", "FLASHMLA", OURS, OURS, "FLASHMLA"]
    assert [turn for turn, _ in turns] == [1, 1, 2, 2, 3, 3]


def test_graphs_are_the_same_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert engine_arguments(True) == {"compilation_config": {"cudagraph_mode": "FULL_DECODE_ONLY"}}
    with_sizes = {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY", "cudagraph_capture_sizes": [4, 8]}
    assert engine_arguments(False, [8, 4, 8]) == {"compilation_config": with_sizes}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert engine_arguments(False)["enforce_eager"]
    assert engine_arguments(False)["kv_cache_memory_bytes"] <= 2**30, "or most of the machine's memory must be free"


def test_steps_are_clocked_by_what_is_in_them(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([100.0, 101.0, 103.0, 106.0, 110.0, 120.0])
    monkeypatch.setattr(clocks.time, "perf_counter", lambda: next(now))
    scheduler = SimpleNamespace(update_from_output=lambda *arguments: arguments)
    core = SimpleNamespace(engine_core=SimpleNamespace(scheduler=scheduler))
    clock = clocks.StepClock()
    clock.watch(SimpleNamespace(llm_engine=SimpleNamespace(engine_core=core)))
    clock.restart()
    for scheduled in ({"a": 50, "b": 20}, {"a": 1, "b": 30}, {}, {"a": 1, "b": 1}, {"a": 1}, {"a": 1}):
        step = SimpleNamespace(num_scheduled_tokens=scheduled)
        assert scheduler.update_from_output(step, "tokens") == (step, "tokens")
    assert clock.summary() == {
        "decode": {"count": 3, "seconds": 17.0, "median_ms": 4000.0},
        "mixed": {"count": 1, "seconds": 2.0, "median_ms": 2000.0},
        "prompts": {"count": 1, "seconds": 1.0, "median_ms": 1000.0},
    }


ANSWERS_THEN_FAILS = "import sys; open(sys.argv[2], 'w').write('[1]'); print('no memory'); raise SystemExit(3)"


def test_what_a_child_answered_before_it_failed_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "some_child.py").write_text(ANSWERS_THEN_FAILS)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    answer, problem = ask_child("some_child", {}, {}, tmp_path / "log", 60, print)
    assert answer == [1] and problem is not None and "ended with code 3" in problem and "no memory" in problem
    assert ask_child("json.no_such_module", {}, {}, tmp_path / "log", 60, print)[0] is None


STARTS_ANOTHER = """
import subprocess, sys, time
other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
print(f"@ {other.pid}", flush=True)
time.sleep(60)
"""


def test_who_is_interrupted_ends_what_it_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "some_child.py").write_text(STARTS_ANOTHER)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    started: list[int] = []

    def interrupted(what: str) -> None:
        started.append(int(what))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ask_child("some_child", {}, {}, tmp_path / "log", 60, interrupted)
    deadline = time.monotonic() + 10
    while is_running(started[0]) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not is_running(started[0])


def is_running(process: int) -> bool:
    """Not so of one that has ended, even if nobody has asked for its exit code yet."""
    status = Path(f"/proc/{process}/stat")
    return status.exists() and status.read_text().rpartition(")")[2].split()[0] != "Z"


def test_turns_are_pooled_and_another_backend_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def ran(plan: Plan, turn: int, backend: str, progressed: object) -> tuple[Any, str | None]:
        impl = "flashmla_backend.Impl" if (turn, backend) != (2, OURS) else "vllm.Impl"
        answer = {"impl": impl, "batched_tokens": 77, "rounds": [{"seconds": turn, "steps": {}}] * plan.rounds}
        return (answer, None) if backend == OURS else (None, "broke")

    monkeypatch.setattr(runs, "run_backend", ran)
    kept: list[int] = []
    results = runs.run(
        plan_of(tmp_path, turns=2), lambda done, of, what: None, lambda so_far: kept.append(len(so_far.notes))
    )
    assert kept == [0, 1, 2, 3], "after each process, with what is known by then"
    assert [(one["turn"], one["seconds"]) for one in results.rounds[OURS]] == [(1, 1), (1, 1)], "not those of another"
    assert results.notes == ["FLASHMLA, turn 1: broke", "FLASHMLA, turn 2: broke", "ours, turn 2: vllm.Impl answered"]
    assert results.batched_tokens == {OURS: 77}


def rounds_of(*seconds: float, mixed_ms: float) -> list[dict[str, Any]]:
    steps = {
        "decode": {"count": 50, "seconds": 9.0, "median_ms": 10.0},  # one step of them was long
        "mixed": {"count": 10, "seconds": 8.0, "median_ms": mixed_ms},
        "prompts": {"count": 1, "seconds": 0.1, "median_ms": 100.0},
    }
    return [{"turn": 1, "seconds": value, "steps": steps} for value in seconds]


def test_report(tmp_path: Path) -> None:
    rounds = {
        OURS: rounds_of(2.0, 1.0, 4.0, mixed_ms=20),
        "FLASHMLA": rounds_of(1.6, 1.6, 1.6, mixed_ms=30),
        "TRITON_MLA": rounds_of(8.0, mixed_ms=15),
        "FLASH_ATTN_MLA": [],
    }
    results = Results(rounds, {OURS: "flashmla_backend.Impl"}, {OURS: 4096}, ["a note"])
    made = json.loads(
        json.dumps(report.make(results, plan_of(tmp_path), ["flashmla", "bench", "offline"], "abc"))
    )  # a round asks for 4 prompts of 50 tokens and 4 answers of 25
    assert [row["backend"] for row in made["rows"]] == [OURS, "FLASHMLA", "TRITON_MLA"]
    assert made["rows"][0]["output_throughput"] == {"median": 50.0, "least": 25.0, "most": 100.0}
    assert made["rows"][0]["total_throughput"]["median"] == 150.0
    assert made["rows"][0]["ms"] == {"decode": 10.0, "mixed": 20.0, "prompts": 100.0}
    assert made["summary"] == {"throughput": 0.8, "decode": 1.0, "mixed": 0.75}
    assert (made["model"], made["at_once"], made["batched_tokens"]) == ("tiny", 2, {OURS: 4096})
    assert report.markdown(made).splitlines()[2] == ("| ours | 50.0 | 25.0 | 100.0 | 150.0 | 50 | 10.00 | 10 | 20.00 |")
    console = Console(width=200, record=True)
    console.print(report.table(made))
    console.print("\n".join(report.lines(made)))
    text = console.export_text()
    for part in (
        "TRITON_MLA",
        "throughput, ours / best of the others: 0.800",
        "mixed step, best of the others / ours: 0.750",
        "flashmla_backend.Impl, up to 4096",
        "a note",
    ):
        assert part in text
    (tmp_path / "offline.json").write_text(json.dumps(made))
    shown = CliRunner().invoke(app, ["bench", "show", str(tmp_path / "offline.json")])
    assert shown.exit_code == 0, shown.output
    assert "time of a mixed step, best of the others / ours: 0.750" in " ".join(shown.output.split())


def test_a_report_of_one_backend_or_of_decodes_alone(tmp_path: Path) -> None:
    rounds = rounds_of(2.0, mixed_ms=20)
    assert report.summarise([report.row_of(OURS, rounds, [(50, 25)])]) == {}
    alone = [{**one, "steps": {"decode": one["steps"]["decode"]}} for one in rounds]
    rows = [report.row_of(OURS, rounds, [(50, 25)]), report.row_of("FLASHMLA", alone, [(50, 25)])]
    assert report.summarise(rows) == {"throughput": 1.0, "decode": 1.0}
    made = report.make(Results({"FLASHMLA": alone}), plan_of(tmp_path), ["flashmla"], "abc")
    assert report.cells(made)[1][-2:] == ["0", "-"]
