"""docs/performance.md shows what was measured: its tables and plots are those that benchmarks/performance.py makes."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import performance
import performance_plots
import performance_reports
import performance_tables
import performance_targets
import pytest
from performance_measures import as_fixed, excess, matmul_share, ours, ragged_ratios

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def reports() -> performance_reports.Reports:
    return performance_reports.load()


def row(heads: int, s_q: int, batch: int, length: int, kind: str, us: float, rival: float, **more: float) -> Any:
    shape = {"h": heads, "s": s_q, "b": batch, "len": length, "kind": kind, "sum": batch * length, "flops": 10**12}
    return {**shape, "ideal_us": 1.0, "ours": {"us": us}, "fa3": {"us": rival}, "best_rival_us": rival, **more}


def with_rows(reports: performance_reports.Reports, *rows: Any) -> performance_reports.Reports:
    return reports._replace(kernels={**reports.kernels, "rows": list(rows)})


def test_the_document_is_of_the_newest_reports(reports: performance_reports.Reports) -> None:
    assert performance.stale(reports) == []


def test_its_links_lead_somewhere(reports: performance_reports.Reports) -> None:
    text = performance.DOCUMENT.read_text()
    links = re.findall(r"\]\(([^)#]+)\)", text)
    assert {f"../benchmarks/results/{file}" for file in performance_plots.PLOTS} <= set(links)
    assert [link for link in links if not (performance.DOCUMENT.parent / link).exists()] == []
    assert "(docs/performance.md)" in (ROOT / "README.md").read_text()


def test_another_report_makes_it_stale(reports: performance_reports.Reports, tmp_path: Path) -> None:
    slower = [{**one, "ours": {**one["ours"], "us": 2 * one["ours"]["us"]}} for one in reports.kernels["rows"]]
    path = tmp_path / "kernels-h200-2100-01-01.json"
    path.write_text(json.dumps({**reports.kernels, "date": "2100-01-01T00:00:00+00:00", "rows": slower}))
    newest = json.loads(path.read_text())
    history = "kernels-history-h200.json"
    later = reports._replace(
        kernels=newest,
        kernels_path=path,
        histories={**reports.histories, history: [*reports.histories[history], performance_reports.abridged(newest)]},
    )
    assert performance.stale(later) == [performance.DOCUMENT.name, *performance_plots.PLOTS, history]


def test_text_between_tables_is_left_alone(reports: performance_reports.Reports) -> None:
    markers = "".join(f"<!-- made: {name} -->\nold\n<!-- end -->\n" for name in performance_tables.SECTIONS)
    made = performance.filled(f"# before\n{markers}after\n", reports)
    assert made.startswith("# before\n<!-- made: ") and made.endswith("<!-- end -->\nafter\n") and "old" not in made
    assert performance.filled(made, reports) == made
    with pytest.raises(ValueError, match="there must be, each once"):
        performance.filled(markers.replace("made: overview", "made: nothing"), reports)


def test_the_newest_report_is_so_by_its_date(tmp_path: Path) -> None:
    for stem, date in {"2026-01-02": "2026-01-02T10", "2026-01-02b": "2026-01-02T20", "pages": "2027"}.items():
        (tmp_path / f"kernels-h100-{stem}.json").write_text(json.dumps({"date": date}))
    assert performance_reports.newest(tmp_path, "kernels-h100")[0].stem == "kernels-h100-2026-01-02b"
    with pytest.raises(FileNotFoundError, match="holds no host-time-h100-DATE"):
        performance_reports.newest(tmp_path, "host-time-h100")


def test_each_history_ends_with_the_newest_report(reports: performance_reports.Reports, tmp_path: Path) -> None:
    performance_reports.write_histories(reports, tmp_path)
    newest = [report["date"] for report in reports.of_each_device()]
    for (file, history), last in zip(reports.histories.items(), newest, strict=True):
        dates = [report["date"] for report in history]
        assert dates == sorted(set(dates)) and dates[-1] == last
        assert json.loads((tmp_path / file).read_text()) == history


def test_a_ragged_batch_is_held_against_an_even_one_of_as_many_tokens() -> None:
    rows = [row(16, 1, 4, length, "fixed", us, 9) for length, us in {1024: 10.0, 2048: 20.0, 4096: 30.0}.items()]
    for total, expected in {4 * 1536: 15.0, 4 * 3072: 25.0, 4 * 512: 5.0, 4 * 5120: 35.0}.items():
        varied = row(16, 1, 4, 1024, "var", 2 * expected, 9, sum=total)
        assert as_fixed(varied, rows, ours) == pytest.approx(expected)
        assert [ratio for _, ratio in ragged_ratios([varied, *rows], ours)] == pytest.approx([2.0])
    assert as_fixed(row(32, 1, 4, 1024, "var", 10, 9), rows, ours) is None


def test_what_is_measured_against_what() -> None:
    assert excess(row(16, 1, 1, 64, "fixed", 10.0, 9, ideal_us=3.0)) == pytest.approx(2.0)
    assert matmul_share(row(16, 1, 1, 64, "fixed", 1e4, 9), {"mm8192_TFLOPs": 200.0}) == pytest.approx(0.5)


def test_targets_are_met_or_not(reports: performance_reports.Reports) -> None:
    slow = row(16, 1, 1, 4096, "fixed", 9.1, 15.0)
    assert "| b=1, 4K, 16 heads | <= 9 us | 9.1 us | 15.0 us | not met |" in performance_targets.targets(
        with_rows(reports, slow)
    )
    table = performance_targets.targets(with_rows(reports, row(16, 1, 1, 4096, "fixed", 9.0, 15.0)))
    assert "| 9.0 us | 15.0 us | met |" in table
    assert "| b=8, 1K, 16 heads | <= 9 us | not in this report |" in table
    assert "least | >= 0.98 | 1.667, 0 of 1 below |  | met |" in table
    assert "share of the matmul rate, least of b=128, 8K and more, 128 heads, s_q 1 | >= 90% | not in" in table


def test_what_calls_at_the_goal_would_be() -> None:
    rows = [
        row(16, 1, 1, 64, "fixed", 10.0, 20.0, ideal_us=1.0),
        row(16, 1, 8, 64, "fixed", 50.0, 100.0, ideal_us=25.0),
    ]
    said = performance_targets.reachable(rows)
    everywhere, batches = (20 / 5.08 * 100 / 31) ** 0.5, (20 / 10 * 100 / 31) ** 0.5
    assert f"would be {everywhere:.3f}; were all there but the 1 with single requests, {batches:.3f}." in said


def test_every_backend_served_every_load(reports: performance_reports.Reports) -> None:
    rows, served = reports.serve["rows"], set(reports.serve["served_by"])
    assert rows and "ours" in served and len(served) > 1 and not reports.serve["notes"]
    for row in rows:
        assert {who: row[who]["completed"] for who in served if who in row} == dict.fromkeys(served, row["prompts"])


def test_a_run_cut_short_is_shown(reports: performance_reports.Reports, tmp_path: Path) -> None:
    for rows in ([row(16, 1, 8, 500, "var", 9, 8)], reports.kernels["rows"][:90]):
        few = with_rows(reports, *rows)
        assert all(section(few) for section in performance_tables.SECTIONS.values())
    for path in performance_plots.draw(few, tmp_path):
        assert reports.digest().encode() in path.read_bytes()
