"""vLLM with speculation: python benchmarks/vllm_speculation.py --out FILE.json [--commit COMMIT]

N-gram drafts, of different lengths from request to request, and those of a model's own layer for multi-token prediction
(MTP), verified by our backend and by vLLM's own: against our answers without speculation, greedy tokens and how far log
probabilities differ while all chose the same tokens. One engine start a line, each in a process of its own. Exit code 1
if one failed, drafted nothing though told to, or was served by another backend.
"""

from __future__ import annotations

import argparse
import random
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import vllm_common as common

from flashmla_backend.bench import machine
from flashmla_backend.bench.provenance import provenance, write
from flashmla_backend.bench.steps.report import deltas
from flashmla_backend.bench.steps.run import vllm_version
from flashmla_backend.checkpoint import make_checkpoint

LENGTHS = (1, 2, 17, 63, 64, 65, 127, 128, 129, 200, 350, 511, 640, 900, 1000, 1500)
NEW_TOKENS = 32
FIRST_TOKEN, TOKENS = 10, 40  # so few different ones that n-grams recur
DRAFTS = 3
NGRAM = {"method": "ngram", "num_speculative_tokens": DRAFTS, "prompt_lookup_min": 1, "prompt_lookup_max": 3}
RUNS: dict[str, tuple[str, str]] = {
    "ours": ("ours", ""),
    "ours, n-gram": ("ours", "ngram"),
    "ours, MTP": ("ours", "mtp"),
    "FLASHMLA": ("FLASHMLA", ""),
    "FLASHMLA, MTP": ("FLASHMLA", "mtp"),
}


def speculation(method: str) -> dict[str, Any]:
    """Of vllm.LLM. A drafting layer gets its backend from here; by this name ours, where it serves."""
    if not method:
        return {}
    mtp = {"method": "mtp", "num_speculative_tokens": DRAFTS, "attention_backend": "FLASHMLA"}
    return {"speculative_config": NGRAM if method == "ngram" else mtp}


def answers_of(name: str, models: dict[str, str], prompts: list[list[int]], scratch: Path) -> dict[str, Any]:
    """All prompts in one batch: tokens and logprobs by request, who served, and how many tokens were drafted."""
    backend, method = RUNS[name]
    engine: dict[str, Any] = {
        "model": models["v3-mtp" if method == "mtp" else "v3-moe"],
        "dtype": "bfloat16",
        "max_model_len": max(LENGTHS) + NEW_TOKENS + 1,
        "max_num_seqs": len(LENGTHS),
        "kv_cache_memory_bytes": 512 << 20,
        "skip_tokenizer_init": True,
        "enable_prefix_caching": False,
        "seed": 0,
        **({"compilation_config": common.GRAPHS} if torch.cuda.is_available() else {"enforce_eager": True}),
        **speculation(method),
    }
    ran = common.answers_of(name, backend, engine, [[(ids, NEW_TOKENS) for ids in prompts]], scratch)
    (batch,) = ran.batches
    drafted, accepted = (
        int(ran.counters.get(f"vllm:spec_decode_num_{what}_tokens", 0)) for what in ("draft", "accepted")
    )
    if method and not drafted:
        raise RuntimeError(f"{name}: nothing was drafted")
    return {
        "tokens": [answer["tokens"] for answer in batch],
        "logprobs": [answer["logprobs"] for answer in batch],
        "about": {"served_by": ran.served_by, "drafted": drafted, "accepted": accepted},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("vllm-speculation.json"))
    parser.add_argument("--commit", help="for the report, where git cannot tell")
    parser.add_argument("--runs", default=";".join(RUNS), help="separated by semicolons")
    arguments = parser.parse_args()
    answers: dict[str, dict[str, Any]] = {}
    failed: dict[str, str] = {}
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with TemporaryDirectory() as folder:
        models = {name: str(make_checkpoint(Path(folder) / name, name)) for name in ("v3-moe", "v3-mtp")}
        draw = random.Random(3)
        prompts = [[draw.randrange(FIRST_TOKEN, FIRST_TOKEN + TOKENS) for _ in range(length)] for length in LENGTHS]
        for name in arguments.runs.split(";"):
            begin = time.monotonic()
            try:
                answers[name] = answers_of(name, models, prompts, Path(folder))
                print(f"{name}: {time.monotonic() - begin:.0f} s; {answers[name]['about']}", flush=True)
            except (subprocess.SubprocessError, RuntimeError, OSError) as error:
                failed[name] = str(error)
                print(f"{name}: failed after {time.monotonic() - begin:.0f} s: {error}", flush=True)
            report = {
                **provenance(machine.describe(device)[0], ["python", *sys.argv], arguments.commit),
                "vllm": vllm_version(),
                "requests": len(LENGTHS),
                "new_tokens": NEW_TOKENS,
                "runs": {who: answer["about"] for who, answer in answers.items()},
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


if __name__ == "__main__":
    main()
