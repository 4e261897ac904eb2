"""`flashmla bench steps` without an engine: points, weights, and what is concluded from answers."""

from __future__ import annotations

import io
import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from flashmla_backend.bench import backends
from flashmla_backend.bench.steps import kernels, models, points, report
from flashmla_backend.bench.steps.run import Results
from flashmla_backend.cli import app
from flashmla_backend.errors import InvalidArgument


def test_no_points() -> None:
    assert points.parse("none") == []
    answer = {"impl": "x", "rows": {}, "tokens": [], "logprobs": []}
    made = report.make(Results({"tiny": {"ours": answer}}), [], ["flashmla"], "abc")
    assert made["rows"] == [] and made["summary"] == {}


def test_points() -> None:
    plain, thousands, ragged = points.parse("64x512,8x32K,2x1K+3x7")
    assert (plain.name, plain.lengths) == ("64x512", (512,) * 64)
    assert thousands.lengths == (32768,) * 8
    assert ragged.lengths == (1024, 1024, 7, 7, 7) and ragged.tokens == 2069


@pytest.mark.parametrize("text", ["", "64", "0x512", "64x0", "64x1k", "8x32K+", "ax3"])
def test_points_that_are_none(text: str) -> None:
    with pytest.raises(InvalidArgument, match=r"accepted: requests x tokens"):
        points.parse(text)


def test_backends() -> None:
    assert backends.parse("ours,TRITON_MLA") == ["ours", "TRITON_MLA"]
    assert backends.selection("ours") == ("FLASHMLA", {"FLASHMLA_BACKEND_DISABLE": "0"})
    assert backends.selection("FLASHMLA") == ("FLASHMLA", {"FLASHMLA_BACKEND_DISABLE": "1"})
    with pytest.raises(InvalidArgument, match="backends has 'flashinfer'; accepted: ours, FLASHMLA"):
        backends.parse("ours,flashinfer")


@pytest.mark.parametrize("name", models.MODELS)
def test_configurations(name: str, tmp_path: Path) -> None:
    config = json.loads((models.write_config(name, "bfloat16", 70000, tmp_path) / "config.json").read_text())
    assert (config["kv_lora_rank"], config["qk_rope_head_dim"], config["max_position_embeddings"]) == (512, 64, 70000)
    assert config["num_attention_heads"] == config["num_key_value_heads"]
    with pytest.raises(InvalidArgument, match="models has 'v4'; accepted: v2-lite, v3-attention, tiny"):
        models.write_config("v4", "bfloat16", 1, tmp_path)


def test_weights_keep_the_level_of_their_input() -> None:
    model = torch.nn.ModuleDict(
        {
            "embed_tokens": torch.nn.Embedding(500, 64),
            "down_proj": torch.nn.Linear(400, 300),
            "q_proj": torch.nn.Linear(400, 300, bias=False),
            "norm": torch.nn.RMSNorm(8),
        }
    )
    models.draw_weights(model)
    weights = dict(model.named_parameters())
    deviations = {name: float(weight.detach().std()) for name, weight in weights.items() if weight.dim() > 1}
    assert deviations == pytest.approx(
        {"embed_tokens.weight": 1.0, "down_proj.weight": 0.05, "q_proj.weight": 0.1}, rel=0.05
    )
    assert torch.equal(weights["norm.weight"], torch.ones(8)) and not weights["down_proj.bias"].any()
    before = {name: weight.detach().clone() for name, weight in weights.items()}
    models.draw_weights(model)
    assert all(torch.equal(before[name], weight) for name, weight in weights.items())


def test_kernels_of_attention() -> None:
    mine = ["void flashmla::sm90::decode_kernel<__nv_bfloat16>(DecodeArguments)", "flashmla::schedule::schedule_kernel"]
    theirs = [
        "void flash::flash_fwd_splitkv_mla_kernel<...>",
        "get_mla_metadata_kernel",
        "void cutlass::device_kernel<flash::FlashAttnFwdSm90<...>>",
        "_fwd_grouped_kernel_stage1",
        "_fwd_kernel_stage2",
    ]
    others = ["void vllm::concat_and_cache_mla_kernel<...>", "nvjet_tst_128x64", "fused_moe_kernel"]
    launches = [kernels.Launch(name, 10.0 * i, 10.0 * i + 1) for i, name in enumerate(mine + theirs + others)]
    assert kernels.attention_us(launches) == len(mine + theirs)
    assert kernels.busy_us(launches) == len(launches)
    assert kernels.busiest([*launches, kernels.Launch(others[0], 500, 502)], 1) == [(others[0], 3.0)]


def test_a_kernel_that_waits_for_another_counts_once() -> None:
    launches = [
        kernels.Launch(name, *span) for name, span in {"b": (2, 7), "a": (0, 5), "c": (3, 4), "d": (9, 10)}.items()
    ]
    assert kernels.busy_us(launches) == 8


def answer(ms: dict[str, float], tokens: list[list[int]], logprobs: list[list[float]]) -> dict[str, Any]:
    rows = {name: {"ms": value, "least_ms": value, "attention_ms": value / 2} for name, value in ms.items()}
    return {"impl": "some.Impl", "rows": rows, "tokens": tokens, "logprobs": logprobs}


def test_report(tmp_path: Path) -> None:
    measured = points.parse("64x512,32x8K")
    ours = answer({"64x512": 2.0, "32x8K": 5.0}, [[1, 2, 3], [4, 5, 6]], [[-1.0, -2.0, -3.0], [-1.0, -9.0, -9.0]])
    triton = answer({"64x512": 3.0, "32x8K": 10.0}, [[1, 2, 3], [4, 7, 6]], [[-1.1, -2.0, -3.3], [-1.0, -1.0, -1.0]])
    flashmla = answer({"64x512": 1.6}, [[1, 2, 3], [4, 7, 6]], [[-1.0, -2.0, -3.1], [-1.0, -1.0, -1.0]])
    answers = {"v3-attention": {"ours": ours, "TRITON_MLA": triton, "FLASHMLA": flashmla}}
    made = report.make(Results(answers, ["a note"]), measured, ["flashmla", "bench", "steps"], "abc")
    assert [report.speed_up(row) for row in made["rows"]] == pytest.approx([0.8, 2.0])
    assert made["summary"]["all"] == {"geomean": pytest.approx(1.6**0.5, abs=1e-3), "min": 0.8, "n": 2}
    assert made["summary"]["attention-heavy"] == {"geomean": 2.0, "min": 2.0, "n": 1}
    deltas = made["deltas"]["v3-attention"]
    assert deltas["ours"] == {
        "from": "TRITON_MLA",
        "mean_abs_dlogprob": pytest.approx(0.4 / 4),
        "standard_error": pytest.approx(0.2 / 4),  # of 0.1, 0 and 0.3; and 0
        "compared_tokens": 4,
    }
    assert deltas["FLASHMLA"]["further_than_ours"] == pytest.approx(-0.1 / 4)  # 0, 0, -0.1 and 0
    assert deltas["FLASHMLA"]["its_standard_error"] == pytest.approx(0.05 / 4)
    assert deltas["FLASHMLA"]["compared_tokens"] == 4  # its own tokens never part from the reference's, but ours do
    console = Console(width=200, file=io.StringIO())
    console.print(report.table(made))
    console.print("\n".join(report.lines(made)))
    text = console.file.getvalue()
    for part in (
        "32x8K",
        "5.00 (2.50)",
        "2.000",
        "0.800",
        "of FLASHMLA from TRITON_MLA",
        "than ours -0.02500 +- 0.01250",
        "a note",
    ):
        assert part in text
    assert report.markdown(made).splitlines()[-1] == "| v3-attention | 32x8K | 5.00 (2.50) | 10.00 (5.00) | - | 2.000 |"
    (tmp_path / "steps.json").write_text(json.dumps(made))
    shown = CliRunner().invoke(app, ["bench", "show", str(tmp_path / "steps.json")])
    assert shown.exit_code == 0, shown.output
    assert (tmp_path / "steps.png").stat().st_size > 10000


def test_a_report_of_nobody_is_shown_without_a_plot(tmp_path: Path) -> None:
    made = report.make(Results({}, ["ours: no memory"]), points.parse("64x512"), ["flashmla", "bench", "steps"], "abc")
    (tmp_path / "steps.json").write_text(json.dumps(made))
    shown = CliRunner().invoke(app, ["bench", "show", str(tmp_path / "steps.json")])
    assert shown.exit_code == 0, shown.output
    assert "no memory" in shown.output and not (tmp_path / "steps.png").exists()


def test_a_command_that_is_asked_to_end_cleans_up_first(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    try:
        CliRunner().invoke(app, ["bench", "show", str(tmp_path / "none.json")])
        with pytest.raises(SystemExit) as ended:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)  # the handler runs between two lines, if not before the first
    finally:
        signal.signal(signal.SIGTERM, before)
    assert ended.value.code == 128 + signal.SIGTERM
