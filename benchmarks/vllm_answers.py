"""What benchmarks share that ask several engines of vLLM for the same answers: prompts, engine, comparison, report."""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import vllm_common as common

from flashmla_backend.bench import machine
from flashmla_backend.bench.provenance import provenance, write
from flashmla_backend.bench.steps.report import deltas
from flashmla_backend.bench.steps.run import vllm_version

LENGTHS = (1, 2, 17, 63, 64, 65, 127, 128, 129, 200, 350, 511, 640, 900, 1000, 1500)  # tokens of the prompts
NEW_TOKENS = 32

Answers = dict[str, Any]  # of one engine: {"tokens": [[id, ...], ...], "logprobs": [[...], ...], "about": as asked}


def ask(
    name: str, backend: str, model: str, prompts: list[list[int]], scratch: Path, more: dict[str, Any]
) -> tuple[Answers, common.Answered]:
    """All prompts, of LENGTHS, in one batch of an engine whose arguments are changed by `more`."""
    engine: dict[str, Any] = {
        "model": model,
        "dtype": "bfloat16",
        "max_model_len": max(LENGTHS) + NEW_TOKENS + 1,
        "max_num_seqs": len(LENGTHS),
        "kv_cache_memory_bytes": 512 << 20,
        "skip_tokenizer_init": True,
        "enable_prefix_caching": False,
        "seed": 0,
        **({"compilation_config": common.GRAPHS} if torch.cuda.is_available() else {"enforce_eager": True}),
        **more,
    }
    ran = common.answers_of(name, backend, engine, [[(ids, NEW_TOKENS) for ids in prompts]], scratch)
    (batch,) = ran.batches
    return {key: [answer[key] for answer in batch] for key in ("tokens", "logprobs")}, ran


def compare(
    description: str,
    output: str,
    runs: Iterable[str],
    prepare: Callable[[Path], Callable[[str], Answers]],
    details: Callable[[dict[str, Any]], dict[str, Any]],
) -> None:
    """The program of such a benchmark, its exit code included.

    prepare: makes models and prompts in a scratch folder, and returns what asks one of `runs`.
    details: of the report, from what is "about" every run that answered.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(output))
    parser.add_argument("--commit", help="for the report, where git cannot tell")
    parser.add_argument("--runs", default=";".join(runs), help="separated by semicolons")
    arguments = parser.parse_args()
    answers: dict[str, Answers] = {}
    failed: dict[str, str] = {}
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with TemporaryDirectory() as folder:
        answers_of = prepare(Path(folder))
        for name in arguments.runs.split(";"):
            begin = time.monotonic()
            try:
                answers[name] = answers_of(name)
                print(f"{name}: {time.monotonic() - begin:.0f} s; {answers[name]['about']}", flush=True)
            except (subprocess.SubprocessError, RuntimeError, OSError) as error:
                failed[name] = str(error)
                print(f"{name}: failed after {time.monotonic() - begin:.0f} s: {error}", flush=True)
            report = {
                **provenance(machine.describe(device)[0], ["python", *sys.argv], arguments.commit),
                "vllm": vllm_version(),
                **details({who: answer["about"] for who, answer in answers.items()}),
                "deltas": deltas(answers, next(iter(answers), None)),
                "failed": failed,
            }
            write(report, arguments.out)
    for who, delta in report["deltas"].items():
        print(
            f"{who}: mean |dlogprob| from {delta['from']} {delta['mean_abs_dlogprob']:.5f} "
            f"over {delta['compared_tokens']} tokens of {len(LENGTHS) * NEW_TOKENS}"
        )
    sys.exit(bool(failed))
