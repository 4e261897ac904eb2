"""vLLM on two GPUs: python benchmarks/vllm_parallel.py --out FILE.json [--commit COMMIT]

Tensor parallelism (TP 2) and decode context parallelism (DCP 2, each GPU holds half of the tokens) on our backend,
against the first run, on one GPU: greedy tokens, and how far log probabilities differ while both chose the same tokens.
One engine start a line, each in a process of its own. Exit code 1 if one failed or was served by another backend.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import vllm_common as common

from flashmla_backend.bench.steps.report import deltas

LENGTHS = (1, 2, 17, 63, 64, 65, 127, 128, 129, 200, 350, 511, 640, 900, 1000, 1500)
NEW_TOKENS = 32
DCP = {"tensor_parallel_size": 2, "decode_context_parallel_size": 2}
RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    "TRITON_MLA": ("TRITON_MLA", {}),
    "ours": ("ours", {}),
    "ours, TP 2": ("ours", {"tensor_parallel_size": 2}),
    "ours, TP 2, DCP 2": ("ours", DCP),
    "ours, TP 2, DCP 2, eager": ("ours", {**DCP, "compilation_config": {}, "enforce_eager": True}),
}


def answers_of(name: str, model: str, prompts: list[list[int]], scratch: Path) -> dict[str, Any]:
    """All prompts in one batch: {"tokens": [[id, ...], ...], "logprobs": [[...], ...], "served_by"}."""
    backend, more = RUNS[name]
    engine: dict[str, Any] = {
        "model": model,
        "dtype": "bfloat16",
        "max_model_len": max(LENGTHS) + NEW_TOKENS + 1,
        "max_num_seqs": len(LENGTHS),
        "kv_cache_memory_bytes": 512 << 20,
        "skip_tokenizer_init": True,
        "enable_prefix_caching": False,
        "compilation_config": common.GRAPHS,
        "seed": 0,
        **more,
    }
    ran = common.answers_of(name, backend, engine, [[(ids, NEW_TOKENS) for ids in prompts]], scratch)
    (batch,) = ran.batches
    return {key: [answer[key] for answer in batch] for key in ("tokens", "logprobs")} | {"served_by": ran.served_by}


def main() -> None:
    import torch

    from flashmla_backend.bench.provenance import provenance, write
    from flashmla_backend.bench.steps.run import vllm_version
    from flashmla_backend.checkpoint import make_checkpoint

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("vllm-parallel.json"))
    parser.add_argument("--commit", help="for the report, where git cannot tell")
    parser.add_argument("--runs", default=";".join(RUNS), help="separated by semicolons")
    arguments = parser.parse_args()
    answers: dict[str, dict[str, Any]] = {}
    failed: dict[str, str] = {}
    with TemporaryDirectory() as folder:
        model = str(make_checkpoint(Path(folder) / "model", "v3-moe"))
        draw = random.Random(3)
        vocabulary = json.loads((Path(model) / "config.json").read_text())["vocab_size"]
        prompts = [[draw.randrange(5, vocabulary) for _ in range(length)] for length in LENGTHS]
        for name in arguments.runs.split(";"):
            begin = time.monotonic()
            try:
                answers[name] = answers_of(name, model, prompts, Path(folder))
                print(f"{name}: {time.monotonic() - begin:.0f} s; {answers[name]['served_by']}", flush=True)
            except (subprocess.SubprocessError, RuntimeError, OSError) as error:
                failed[name] = str(error)
                print(f"{name}: failed after {time.monotonic() - begin:.0f} s: {error}", flush=True)
            report = {
                **provenance(torch.cuda.get_device_name(), ["python", *sys.argv], arguments.commit),
                "devices": torch.cuda.device_count(),
                "vllm": vllm_version(),
                "served_by": {who: answer["served_by"] for who, answer in answers.items()},
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
