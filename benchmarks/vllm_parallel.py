"""vLLM on two GPUs: python benchmarks/vllm_parallel.py --out FILE.json [--commit COMMIT]

Tensor parallelism (TP 2) and decode context parallelism (DCP 2, each GPU holds half of the tokens) on our backend,
against the first run, on one GPU: greedy tokens, and how far log probabilities differ while both chose the same tokens.
One engine start a line, each in a process of its own. Exit code 1 if one failed or was served by another backend.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from vllm_answers import LENGTHS, Answers, ask, compare

from flashmla_backend.checkpoint import make_checkpoint

DCP = {"tensor_parallel_size": 2, "decode_context_parallel_size": 2}
RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    "TRITON_MLA": ("TRITON_MLA", {}),
    "ours": ("ours", {}),
    "ours, TP 2": ("ours", {"tensor_parallel_size": 2}),
    "ours, TP 2, DCP 2": ("ours", DCP),
    "ours, TP 2, DCP 2, eager": ("ours", {**DCP, "compilation_config": {}, "enforce_eager": True}),
}


def prepare(scratch: Path) -> Callable[[str], Answers]:
    """What asks one of RUNS, and says who served."""
    model = str(make_checkpoint(scratch / "model", "v3-moe"))
    draw = random.Random(3)
    vocabulary = json.loads((Path(model) / "config.json").read_text())["vocab_size"]
    prompts = [[draw.randrange(5, vocabulary) for _ in range(length)] for length in LENGTHS]

    def answers_of(name: str) -> Answers:
        backend, more = RUNS[name]
        answers, ran = ask(name, backend, model, prompts, scratch, more)
        return {**answers, "about": ran.served_by}

    return answers_of


def details(served_by: dict[str, Any]) -> dict[str, Any]:
    return {"devices": torch.cuda.device_count(), "served_by": served_by}


if __name__ == "__main__":
    compare(__doc__ or "", "vllm-parallel.json", RUNS, prepare, details)
