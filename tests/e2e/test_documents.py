"""What README and examples/ show, run as they stand."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from vllm_answers import LENGTHS, NEW_TOKENS

from flashmla_backend.bench import report, trust
from flashmla_backend.bench.steps import report as steps_report
from flashmla_backend.integration.vllm.builder import SHORT_PREFILL
from flashmla_backend.serve import DEFAULT_NAME, Server

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def run(*command: str, cwd: Path) -> str:
    """What Python prints, started away from the source tree."""
    return subprocess.check_output([sys.executable, *command], cwd=cwd, text=True, timeout=120)


def test_the_api_in_the_readme_runs(tmp_path: Path) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert "2 requests" in run("-c", code, cwd=tmp_path)


def test_the_readme_shows_the_curl_line_that_serve_prints() -> None:
    assert Server("any", DEFAULT_NAME).curl in README


def test_the_readme_quotes_the_kernel_reports_it_links() -> None:
    for device in ("h100", "h200"):
        quoted = recorded(f"kernels-{device}")
        assert f"    {report.summary_line(quoted)}\n    {report.invariance_line(quoted)}\n" in README
        assert quoted["summary"] == report.summarise(quoted["rows"])


def test_the_readme_shows_the_steps_that_were_measured() -> None:
    paths = re.findall(r"\((benchmarks/results/steps-\S+\.json)\)", README)
    assert paths
    for path in paths:
        measured = json.loads((ROOT / path).read_text())
        assert steps_report.markdown(measured) in README
        if heavy := measured["summary"].get("attention-heavy"):
            said = f"is {heavy['geomean']:.3f} in the geometric mean, {heavy['min']:.3f} at least"
            assert said in " ".join(README.split())
        assert measured["summary"] == steps_report.summarise(measured["rows"])


def recorded(kind: str) -> dict[str, Any]:
    """The report of that kind that README links."""
    (path,) = re.findall(rf"\((benchmarks/results/{kind}-\S+\.json)\)", README)
    found: dict[str, Any] = json.loads((ROOT / path).read_text())
    return found


def test_the_readme_quotes_what_was_recorded() -> None:
    correctness = recorded("correctness")
    assert f"[{correctness['cases']:,} cases]" in README and correctness["failed"] == 0
    assert trust.markdown(recorded("trust")) in README
    assert recorded("bounds-cost")["geometric_mean"] <= 1.01
    runs = recorded("sglang-decode")["runs"]
    for shape in runs["ours"]["steps"]:
        times = " | ".join(f"{run['steps'][shape]['median_ms']:.2f}" for run in runs.values())
        assert f"| {shape} | {times} |\n" in README


def test_the_readme_quotes_what_engines_did() -> None:
    invariance = recorded("vllm-invariance")["rows"]
    assert f"0 of {invariance['ours']['cases']} differed" in README and invariance["ours"]["differing"] == 0
    assert invariance["ours, free"]["differing"] > 0
    runs = recorded("sglang-serve")["runs"]
    assert not any(run["errors"] for run in runs.values())
    for mode in ("graph", "eager"):
        assert runs[f"ours, {mode}"]["tokens_per_second"] > runs[f"triton, {mode}"]["tokens_per_second"]
    kit = recorded("sglang-kit")["cases"]
    assert len(kit) >= 36 and all(case["ok"] for case in kit)
    assert {int(case["case"].rsplit(" ", 1)[1]) for case in kit} == {16, 64, 128}
    parallel = recorded("sglang-parallel")
    ours, with_dcp = (parallel["compared"][f"ours, TP 2{more}"]["mean"] for more in ("", ", DCP 2"))
    assert f"by {with_dcp:.3f} in the mean, with tensor parallelism alone by {ours:.3f}" in README


def test_the_readme_quotes_vllm_on_two_gpus() -> None:
    parallel = recorded("vllm-parallel")
    assert parallel["devices"] == 2 and not parallel["failed"]
    heads = {
        who: int(re.findall(r"sm_90a kernels, .* (\d+) query heads", by)[0])
        for who, by in parallel["served_by"].items()
    }
    assert heads["ours"] == heads["ours, TP 2, DCP 2"] == 2 * heads["ours, TP 2"]  # DCP gathers the heads of its ranks
    assert {delta["from"] for delta in parallel["deltas"].values()} == {"ours"}
    means, tokens = (
        [parallel["deltas"][f"ours, TP 2{more}"][key] for more in (", DCP 2", "")]
        for key in ("mean_abs_dlogprob", "compared_tokens")
    )
    said = " ".join(README.split())
    assert f"differed from those of this backend on one by {means[0]:.3f} in the mean over {tokens[0]} tokens" in said
    assert f"with tensor parallelism alone by {means[1]:.3f} over {tokens[1]} (" in said
    assert f"of the {len(LENGTHS) * NEW_TOKENS} greedy tokens" in said


def test_the_readme_quotes_what_small_pages_cost() -> None:
    cost = {size: 100 * (mean - 1) for size, mean in recorded("page-sizes")["geometric_mean"].items()}
    assert f"Pages of 32 tokens cost {cost['32']:.1f} % and pages of 16 tokens {cost['16']:.1f} % of a call" in README


def test_the_readme_quotes_what_short_prompts_take() -> None:
    report = recorded("short-prefills")
    assert not report["failed"]
    times = {
        row["new"]: [f"{row[how]['ms']:.0f}" for how in ("ours, decoded", "ours, prefilled")]
        for row in report["rows"]
        if (row["model"], row["context"], row["requests"]) == ("v3-attention", 16384, 8)
    }
    said = " ".join(README.split())
    assert f"first tokens after {times[8][0]} ms instead of {times[8][1]} with 128 heads" in said
    assert f"of 128 new tokens after {times[128][0]} instead of {times[128][1]}, on an H200" in said
    assert f"prompts of up to {SHORT_PREFILL} tokens" in said


def test_the_readme_quotes_steps_on_the_other_device() -> None:
    (path,) = (ROOT / "benchmarks" / "results").glob("steps-v3-attention-h100-*.json")
    heavy = json.loads(path.read_text())["summary"]["attention-heavy"]
    said = " ".join(README.split())
    assert f"On an H100 it is {heavy['geomean']:.3f} in the geometric mean of the same four batches" in said
    assert f"at least {heavy['min']:.3f}" in said and heavy["n"] == 4


def test_the_readme_quotes_how_far_answers_lie_apart() -> None:
    said = " ".join(README.split())
    for model in ("v3-attention", "v2-lite"):
        found = recorded(f"answers-{model}")["deltas"][model]
        ours, theirs = (found[who] for who in ("ours", "FLASHMLA"))
        assert {ours["from"], theirs["from"]} == {"TRITON_MLA"}
        assert ours["mean_abs_dlogprob"] <= theirs["mean_abs_dlogprob"]
        assert f"{ours['compared_tokens']:,} tokens" in said
        quoted = [f"{one['mean_abs_dlogprob']:.3f} ± {one['standard_error']:.3f}" for one in (ours, theirs)]
        assert all(number in said for number in quoted)


def test_the_readme_quotes_speculation_and_host_time() -> None:
    said = " ".join(README.split())
    speculation = recorded("vllm-speculation")
    ngram, mtp = (speculation["deltas"][f"ours, {how}"] for how in ("n-gram", "MTP"))
    assert not speculation["failed"] and ngram["from"] == mtp["from"] == "ours"
    means = " and ".join(f"{one['mean_abs_dlogprob']:.3f}" for one in (ngram, mtp))
    tokens = speculation["requests"] * speculation["new_tokens"]
    assert f"differed by {means} in the mean over {ngram['compared_tokens']} of {tokens} greedy tokens" in said
    host = recorded("vllm-host")["host_us"]
    for times in host.values():
        assert all(times["ours"][part] < times["FLASHMLA"][part] for part in ("build", "forward_mqa"))
    step = {who: times["step of 48 layers"] / 1e3 for who, times in host["batch 8"].items()}
    planning = {who: times["build"] for who, times in host["batch 8"].items()}
    assert f"takes {step['ours']:.1f} ms of the host's time, of which planning {planning['ours']:.0f} µs" in said
    assert f"with vLLM's own FLASHMLA {step['FLASHMLA']:.1f} ms and {planning['FLASHMLA']:.0f} µs" in said


def test_the_soak_in_the_readme_passed() -> None:
    (path,) = re.findall(r"\[soak\]\((benchmarks/results/\S+\.json)\)", README)
    soak = json.loads((ROOT / path).read_text())
    assert soak["failed"] == 0 and not soak["failures"] and soak["canaries"]["different"] == 1
    assert soak["seconds"] >= 600 and all(soak["counters"].values())


def test_the_offline_example_agrees_with_the_reference(tmp_path: Path) -> None:
    printed = run(str(ROOT / "examples" / "offline_decode.py"), "--dtype", "float32", "1", "65", "300", cwd=tmp_path)
    assert "request 2 pages" in printed
    errors = printed.splitlines()[-1].replace(",", "").split()
    assert float(errors[errors.index("out") + 1]) < 1e-4 and float(errors[-1]) < 1e-4
