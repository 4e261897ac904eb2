"""`flashmla bench` on the CPU: its problems, its verdicts, its reports. No assertion on times."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from flashmla_backend import reference
from flashmla_backend.bench import contenders, report
from flashmla_backend.bench.check import compare
from flashmla_backend.bench.cli import app
from flashmla_backend.bench.contenders import Prepare, load, load_absorbed
from flashmla_backend.bench.machine import Machine
from flashmla_backend.bench.problems import PAGE_BYTES, Shape, grid, make_pool, make_problem
from flashmla_backend.bench.provenance import provenance
from flashmla_backend.errors import InvalidArgument

CPU = torch.device("cpu")
TINY = ["--heads", "2", "--sq", "1,2", "--batch", "2", "--lens", "100", "--budget", "120"]
ROW_KEYS = {"h", "s", "b", "len", "kind", "sum", "max", "R", "flops", "bytes", "ideal_us"}


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def bench(out: Path, *arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["kernels", *TINY, "--out", str(out), *arguments], env={"COLUMNS": "200"})
    return result.exit_code, result.output


@pytest.mark.usefixtures("no_gpu")
def test_a_run_checks_times_and_reports(tmp_path: Path) -> None:
    out = tmp_path / "results" / "cpu.json"
    exit_code, output = bench(out, "--commit", "abc123")
    assert exit_code == 0, output
    made = json.loads(out.read_text())
    assert made["commit"] == "abc123"
    assert {"device", "sms", "l2", "torch", "copy_GBs", "read_reduce_GBs", "mm8192_TFLOPs", "date", "command"} <= set(
        made
    )
    assert sorted((row["s"], row["kind"]) for row in made["rows"]) == [
        (1, "fixed"),
        (1, "var"),
        (2, "fixed"),
        (2, "var"),
    ]
    for row in made["rows"]:
        assert set(row) >= ROW_KEYS
        for name in ("ours", "torch_absorbed", "torch_chunked"):
            assert set(row[name]) == {"us", "min_us", "tflops", "gbs"}
    assert all(record[name]["right"] for record in made["check"] for name in ("ours", "torch_absorbed"))
    assert any(note.startswith("naive left out") for note in made["notes"])
    assert made["summary"]["ours"]["n"] == 4

    shown = CliRunner().invoke(app, ["show", str(out)], env={"COLUMNS": "200"})
    assert shown.exit_code == 0, shown.output
    assert "torch_chunked" in shown.output


def test_a_recorded_command_holds_no_machine_paths() -> None:
    made = provenance("Made-up GPU", ["flashmla", "bench", "--out", "/a/b/x.json", "--record=/a/y.json", "a/b"], "abc")
    assert made["command"] == "flashmla bench --out x.json --record=y.json a/b"


def test_what_is_no_report_is_said(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text("[1]")
    result = CliRunner().invoke(app, ["show", str(path)])
    assert result.exit_code == 2
    assert "is no report" in " ".join(result.output.split())


def load_wrong(device: torch.device) -> Prepare:
    """Answers as if the last token of each request were not there."""
    right = load_absorbed(device)

    def prepare(problem):  # type: ignore[no-untyped-def]
        problem.lengths[:] = [max(1, length - 1) for length in problem.lengths]
        return right(problem)

    return prepare


@pytest.mark.usefixtures("no_gpu")
def test_a_wrong_contender_is_not_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(contenders.LOADERS, "torch_chunked", load_wrong)
    exit_code, _ = bench(tmp_path / "r.json", "--impls", "ours,torch_chunked", "--kinds", "fixed", "--sq", "1")
    made = json.loads((tmp_path / "r.json").read_text())
    assert exit_code == 0
    assert all("torch_chunked" not in row and "ours" in row for row in made["rows"])
    assert any("not timed" in note and "torch_chunked" in note for note in made["notes"])


@pytest.mark.usefixtures("no_gpu")
def test_wrong_answers_of_ours_fail_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(contenders.LOADERS, "ours", load_wrong)
    exit_code, _ = bench(tmp_path / "r.json", "--impls", "ours", "--kinds", "fixed", "--sq", "1")
    assert exit_code == 1


@pytest.mark.usefixtures("no_gpu")
def test_a_spent_budget_is_said(tmp_path: Path) -> None:
    exit_code, _ = bench(tmp_path / "r.json", "--impls", "ours", "--budget", "1")
    made = json.loads((tmp_path / "r.json").read_text())
    assert exit_code == 0
    assert made["rows"] == []
    assert "4 of 4 shapes not run" in made["notes"][-1]


@pytest.mark.usefixtures("no_gpu")
@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--heads", "16,x"], "heads is '16,x'"),
        (["--batch", "0"], "batch is '0'"),
        (["--kinds", "ragged"], "kinds is 'ragged'; accepted: fixed, var"),
        (["--impls", "theirs"], "impls names theirs; accepted: ours, ours-invariant, naive"),
    ],
)
def test_bad_flags_are_named(tmp_path: Path, arguments: list[str], message: str) -> None:
    exit_code, output = bench(tmp_path / "r.json", *arguments)
    assert exit_code == 2
    assert message in output


def test_rivals_do_not_load_without_a_hopper_gpu() -> None:
    able, reasons = load(["flashmla", "fa3", "flashinfer"], CPU)
    assert able == []
    assert set(reasons) == {"flashmla", "fa3", "flashinfer"}
    with pytest.raises(InvalidArgument, match="impls names nobody"):
        load(["nobody"], CPU)


def test_the_grid_is_every_combination_once() -> None:
    shapes = grid([16, 128], [1], [1, 8], [1024], ["fixed", "var"])
    assert len(shapes) == len(set(shapes)) == 6  # one request has no varied lengths
    assert Shape(16, 1, 1, 1024, "var") not in shapes
    assert shapes == grid([16, 128], [1], [1, 8], [1024], ["fixed", "var"])


def test_varied_lengths_hold_every_query() -> None:
    lengths = Shape(16, 4, 128, 100, "var").lengths()
    assert min(lengths) >= 4
    assert len(set(lengths)) > 20
    assert lengths == Shape(128, 4, 128, 100, "var").lengths()


def test_rotations_sweep_the_cache() -> None:
    shape = Shape(16, 1, 8, 1024, "fixed")
    assert shape.rotations(0) == 1
    for l2 in (10 << 20, 50 << 20):
        assert shape.rotations(l2) * shape.pages() * PAGE_BYTES >= 2.5 * l2
    assert Shape(16, 1, 1, 64, "fixed").rotations(50 << 20) == 64


def test_no_page_is_in_two_tables() -> None:
    shape = Shape(2, 1, 3, 200, "var")
    pool = make_pool([shape], 1 << 20, CPU)
    problem = make_problem(pool, shape.lengths(), 2, 1, rotations=shape.rotations(1 << 20))
    assert problem.rotations > 1
    ids = torch.cat(problem.page_ids).tolist()
    assert len(ids) == len(set(ids)) == shape.pages() * problem.rotations
    for table, used in zip(problem.block_tables, problem.page_ids, strict=True):
        flat = [page for row, n in zip(table.tolist(), problem.lengths, strict=True) for page in row[: -(-n // 64)]]
        assert flat == used.tolist()


@pytest.mark.usefixtures("no_gpu")
def test_a_run_may_be_of_peaked_scores(tmp_path: Path) -> None:
    """The baseline rounds scores, and so the more the larger they are."""
    errors = []
    for spread in ("1", "2.5"):
        out = tmp_path / f"{spread}.json"
        exit_code, output = bench(out, "--impls", "ours,torch_absorbed", "--spread", spread)
        assert exit_code == 0, output
        checked = json.loads(out.read_text())["check"]
        assert all(record[name]["right"] for record in checked for name in ("ours", "torch_absorbed"))
        errors.append(max(record["torch_absorbed"]["rel_rms"] for record in checked))
    assert errors[1] > 1.5 * errors[0]


@pytest.mark.parametrize("spread", [1.0, 2.5])
def test_scores_are_as_peaked_as_asked(spread: float) -> None:
    shape = Shape(16, 1, 4, 640, "fixed")
    problem = make_problem(make_pool([shape], 0, CPU), shape.lengths(), 16, 1, spread=spread)
    keys = problem.cache[problem.page_ids[0].long()].flatten(0, 2).float()  # [tokens, 576]
    scores = problem.queries[0].flatten(0, 2).float() @ keys.T * problem.softmax_scale
    assert scores.std().item() == pytest.approx(spread, rel=0.05)
    assert problem.spread == pytest.approx(spread)


def test_bytes_and_flops_are_those_of_the_roofline() -> None:
    pool = make_pool([Shape(128, 2, 3, 128, "fixed")], 0, CPU)
    problem = make_problem(pool, [128, 100, 60], 128, 2)
    assert problem.flops == 2 * (128 * 2) * 288 * (576 + 512)
    assert problem.bytes == 288 * 1152 + 3 * 2 * 128 * (576 + 512) * 2
    slow_memory = Machine("x", 1, 0, 1.0, 1.0, 1e9)
    assert slow_memory.ideal_us(problem) == pytest.approx(problem.bytes / 1e3)
    slow_arithmetic = Machine("x", 1, 0, 1e9, 1e9, 1.0)
    assert slow_arithmetic.ideal_us(problem) == pytest.approx(problem.flops / 1e6)


def test_the_verdict_tells_rounding_from_a_lost_token() -> None:
    pool = make_pool([Shape(4, 1, 2, 64, "fixed")], 0, CPU)
    problem = make_problem(pool, [64, 40], 4, 1)

    def answer(lengths: torch.Tensor) -> torch.Tensor:
        q, table = problem.queries[0], problem.block_tables[0]
        return reference.mla_decode(q, pool, table, lengths, softmax_scale=problem.softmax_scale)[0]

    expected = answer(problem.seq_lens)
    assert compare(expected.bfloat16(), expected)["right"]
    assert not compare(answer(problem.seq_lens - 1), expected)["right"]
    assert not compare(expected.masked_fill(expected == expected.max(), float("nan")), expected)["right"]


def test_the_summary_is_against_the_best_rival() -> None:
    def row(ours: float, rival: float, naive: float) -> dict[str, object]:
        return {"ours": {"us": ours}, "fa3": {"us": rival}, "naive": {"us": naive}, "best_rival_us": rival}

    summary = report.summarise([row(1, 2, 0.1), row(1, 0.5, 9)])
    assert summary == {"ours": {"geomean": 1.0, "min": 0.5, "n": 2, "losing": 1}}
    assert report.summarise([{"ours": {"us": 1.0}, "naive": {"us": 3.0}}])["ours"]["geomean"] == 3.0
    assert report.summarise([{"fa3": {"us": 1.0}}]) == {}
