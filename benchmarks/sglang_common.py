"""What the benchmarks of SGLang share: backends by name, engines in processes of their own, weights drawn on the
device, and the comparison of answers.

SGLang's workers import the file anew that was started, so `prepare()` at its top runs in each of them.
"""

from __future__ import annotations

import json
import os
import random
import signal
import statistics
import subprocess
import sys
import time
from argparse import SUPPRESS, ArgumentParser
from contextlib import suppress
from itertools import takewhile
from pathlib import Path
from typing import Any

from flashmla_backend.bench.backends import OURS
from flashmla_backend.bench.child import last_lines
from flashmla_backend.bench.serve.engine import OUR_LINE
from flashmla_backend.checkpoint import make_checkpoint
from flashmla_backend.integration.claim import DISABLE_VARIABLE
from flashmla_backend.integration.sglang import cpu

FIRST_TEXT_TOKEN, LAST_TEXT_TOKEN = 6, 500
IN_ENGINE = "SGLANG_BENCHMARK_ENGINE"  # set in the processes that run SGLang

# SGLang's own FlashMLA takes prompts to FlashInfer; to compare decode alone they run on Triton, as they do with ours.
SELECTION = {
    OURS: {"attention_backend": "flashmla"},
    "flashmla": {"prefill_attention_backend": "triton", "decode_attention_backend": "flashmla"},
}

Answer = dict[str, Any]  # {"ids": [...], "logprobs": [...]} of the tokens of one answer


def selection(backend: str) -> tuple[dict[str, str], dict[str, str]]:
    """SGLang's arguments for a backend, and the environment that goes with them."""
    arguments = SELECTION.get(backend, {"attention_backend": backend})
    return arguments, {DISABLE_VARIABLE: "0" if backend == OURS else "1", IN_ENGINE: "1"}


def prepare() -> None:
    """Where SGLang runs: also without a GPU, dummy weights that matter, and its FlashMLA without FlashInfer."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TORCH_COMPILE_DISABLE", "1")
    if IN_ENGINE not in os.environ:
        return
    cpu.prepare()
    from sglang.srt.layers.attention import flashinfer_mla_backend
    from sglang.srt.model_loader import loader

    from flashmla_backend.bench.steps.models import draw_weights

    loader.initialize_dummy_weights = draw_weights
    for name in ("BatchMLAPagedAttentionWrapper", "BatchPrefillWithRaggedKVCacheWrapper"):
        if not hasattr(flashinfer_mla_backend, name):  # FlashMLA makes them, and uses them for prompts only
            setattr(flashinfer_mla_backend, name, lambda *_, **__: None)


def add_options(parser: ArgumentParser, name: str, *, limit_s: float, bound: float) -> None:
    """What every script here is told. name: of the report, and of the folder of logs."""
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--limit", type=float, default=limit_s, help="seconds for each start of an engine and its work")
    parser.add_argument("--bound", type=float, default=bound, help="mean difference in logprobs that is accepted")
    parser.add_argument("--logs", type=Path, default=Path(f"{name}-logs"))
    parser.add_argument("--out", type=Path, default=Path(f"{name}.json"))
    parser.add_argument("--commit", help="for the report, where git cannot tell")


def add_child_options(parser: ArgumentParser) -> None:
    """What `run_child` tells the script beside them."""
    parser.add_argument("--run", help=SUPPRESS)  # one run, in a child: its answer's file
    parser.add_argument("--model", help=SUPPRESS)


def make_dense_model(path: Path, layers: int, heads: int) -> Path:
    """A checkpoint of DeepSeek-V2's shape without experts."""
    changes = {"num_hidden_layers": layers, "first_k_dense_replace": layers}
    changes |= {"num_attention_heads": heads, "num_key_value_heads": heads}
    return make_checkpoint(path, "v2-dense", dtype="bfloat16", changes=changes)


def run_child(
    name: str, backend: str, command: list[str], answer: Path, logs: Path, limit_s: float
) -> tuple[dict[str, Any], str | None]:
    """What a script with an engine of `backend` answered, as far as it came, and what went wrong.

    name: of the log in the folder `logs`; command: the script and its arguments, which leave their answer as JSON.
    Its processes end with it.
    """
    logs.mkdir(parents=True, exist_ok=True)
    log, started = logs / f"{name.replace(', ', '-')}.log", time.monotonic()
    with (
        log.open("wb") as output,
        subprocess.Popen(
            [sys.executable, *command],
            env={**os.environ, **selection(backend)[1]},
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        ) as process,
    ):
        try:
            problem = f"ended with code {code}" if (code := process.wait(limit_s)) else None
        except subprocess.TimeoutExpired:
            problem = f"not done after {limit_s:.0f} s"
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # a worker may outlive the engine, and hold its memory
    served = OUR_LINE.search(log.read_text(errors="replace")) is not None
    if problem is None and served != (backend == OURS):
        problem = f"our backend {'served' if served else 'did not serve'}"
    print(f"{name}: {problem or 'done'} in {time.monotonic() - started:.0f} s", flush=True)
    found = json.loads(answer.read_text()) if answer.exists() else {}
    return found, f"{problem} ({log}):\n{last_lines(log)}" if problem else None


def prompt(length: int, seed: int) -> list[int]:
    return random.Random(f"{length} {seed}").choices(range(FIRST_TEXT_TOKEN, LAST_TEXT_TOKEN), k=length)


def answer_of(output: dict[str, Any]) -> Answer:
    """Of what SGLang's `/generate` returned with `return_logprob`: (logprob, id, text) of each token."""
    found = output["meta_info"]["output_token_logprobs"]
    return {"ids": [token[1] for token in found], "logprobs": [token[0] for token in found]}


def compare(first: list[Answer], second: list[Answer]) -> dict[str, float]:
    """Logprob differences of two greedy runs, token by token while both have the same tokens before it.

    The first token in which two answers part still counts: each is the likeliest one, so in likelihood they are close.
    """
    differences: list[float] = []
    for a, b in zip(first, second, strict=True):
        same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(a["ids"], b["ids"], strict=False)))
        pairs = zip(a["logprobs"][: same + 1], b["logprobs"][: same + 1], strict=False)
        differences += [abs(x - y) for x, y in pairs]
    return {
        "tokens_compared": len(differences),
        "tokens": sum(len(answer["ids"]) for answer in first),
        "mean": statistics.fmean(differences) if differences else float("nan"),
        "max": max(differences, default=float("nan")),
    }


def words(compared: dict[str, float]) -> str:
    return (
        f"{compared['tokens_compared']} of {compared['tokens']} tokens until the answers part; logprobs differ by "
        f"{compared['mean']:.4f} in the mean, {compared['max']:.4f} at most"
    )


def far_off(compared: dict[str, dict[str, float]], bound: float) -> list[str]:
    """The comparisons whose mean is not within `bound`, in words."""
    wrong = {name: seen["mean"] for name, seen in compared.items() if not seen["mean"] <= bound}
    return [f"{name}: logprobs differ by {mean:.4f} in the mean, bound {bound}" for name, mean in wrong.items()]
