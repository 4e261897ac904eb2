"""vLLM with speculation: python benchmarks/vllm_speculation.py --out FILE.json [--commit COMMIT]

N-gram drafts, of different lengths from request to request, and those of a model's own layer for multi-token prediction
(MTP), verified by our backend and by vLLM's own: against our answers without speculation, greedy tokens and how far log
probabilities differ while all chose the same tokens. One engine start a line, each in a process of its own. Exit code 1
if one failed, drafted nothing though told to, or was served by another backend.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vllm_answers import LENGTHS, NEW_TOKENS, Answers, ask, compare

from flashmla_backend.checkpoint import make_checkpoint

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


def prepare(scratch: Path) -> Callable[[str], Answers]:
    """What asks one of RUNS, and says who served and how many tokens were drafted."""
    models = {name: str(make_checkpoint(scratch / name, name)) for name in ("v3-moe", "v3-mtp")}
    draw = random.Random(3)
    prompts = [[draw.randrange(FIRST_TOKEN, FIRST_TOKEN + TOKENS) for _ in range(length)] for length in LENGTHS]

    def answers_of(name: str) -> Answers:
        backend, method = RUNS[name]
        model = models["v3-mtp" if method == "mtp" else "v3-moe"]
        answers, ran = ask(name, backend, model, prompts, scratch, speculation(method))
        drafted, accepted = (
            int(ran.counters.get(f"vllm:spec_decode_num_{what}_tokens", 0)) for what in ("draft", "accepted")
        )
        if method and not drafted:
            raise RuntimeError(f"{name}: nothing was drafted")
        return {**answers, "about": {"served_by": ran.served_by, "drafted": drafted, "accepted": accepted}}

    return answers_of


def details(about: dict[str, Any]) -> dict[str, Any]:
    return {"requests": len(LENGTHS), "new_tokens": NEW_TOKENS, "runs": about}


if __name__ == "__main__":
    compare(__doc__ or "", "vllm-speculation.json", RUNS, prepare, details)
