"""SGLang's decode on one GPU with different attention backends: the same logprobs? how long a step?

    python benchmarks/sglang_decode.py --backends triton,flashmla --out sglang.json

One engine per backend, in a process of its own with a time limit, on the same locally made DeepSeek-V2-shaped model of
many thin layers (an engine's step of a small model is bound by the host). First correctness: 32 prompts of mixed
lengths, decoded greedily; two backends are compared over the tokens up to where their answers part. Then the time of a
step: decoding N tokens less decoding one, from a filled prefix cache, in CUDA graphs unless --eager.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import takewhile
from pathlib import Path
from typing import Any

from flashmla_backend.checkpoint import make_checkpoint
from flashmla_backend.integration.sglang import cpu

cpu.prepare()  # does nothing on a GPU; SGLang's workers import this file anew

FIRST_TEXT_TOKEN, LAST_TEXT_TOKEN = 6, 500
ANSWER_TOKENS = 64


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backends", default="triton,flashmla")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--layers", type=int, default=48)
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--shapes", default="1x8192,16x8192,64x4096", help="requests x tokens in the cache")
    parser.add_argument("--steps", type=int, default=128, help="decode steps that are timed")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--longest-prompt", type=int, default=1500)
    parser.add_argument("--eager", action="store_true")
    parser.add_argument("--limit", type=float, default=180, help="seconds per backend")
    parser.add_argument("--out", type=Path, default=Path("sglang_decode.json"))
    parser.add_argument("--run", help=argparse.SUPPRESS)  # one backend, in a child: its answer's file
    parser.add_argument("--model", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> int:
    asked = arguments()
    if asked.run:
        Path(asked.run).write_text(json.dumps(measure(asked)))
        return 0
    folder = Path(tempfile.mkdtemp())
    model = make_checkpoint(
        folder / "model",
        "v2-dense",
        dtype="bfloat16",
        changes={
            "num_hidden_layers": asked.layers,
            "first_k_dense_replace": asked.layers,
            "num_attention_heads": asked.heads,
            "num_key_value_heads": asked.heads,
        },
    )
    backends = asked.backends.split(",")
    runs: dict[str, Any] = {}
    for number, backend in enumerate(backends):
        answer = folder / f"{number}.json"
        command = [sys.executable, __file__, *sys.argv[1:], "--backends", backend]
        started = time.time()
        try:
            subprocess.run([*command, "--run", str(answer), "--model", str(model)], timeout=asked.limit, check=False)
        except subprocess.TimeoutExpired:
            print(f"{backend}: not done after {asked.limit:.0f} s", flush=True)
        if answer.exists():
            runs[backend] = json.loads(answer.read_text())
            print(f"{backend}: done in {time.time() - started:.0f} s", flush=True)
    compared = {
        backend: compare(runs[backends[0]]["answers"], runs[backend]["answers"])
        for backend in backends[1:]
        if backends[0] in runs and backend in runs
    }
    report = {"arguments": {k: str(v) for k, v in vars(asked).items()}, "runs": runs, "compared": compared}
    asked.out.write_text(json.dumps(report, indent=1))
    print_report(report, backends)
    return 0 if set(runs) == set(backends) else 1


def measure(asked: argparse.Namespace) -> dict[str, Any]:
    from sglang.srt.entrypoints.engine import Engine

    shapes = [tuple(map(int, shape.split("x"))) for shape in asked.shapes.split(",")]
    slots = max(requests * (tokens + asked.steps + 128) for requests, tokens in shapes)
    most = max(32, *(requests for requests, _ in shapes))
    engine = Engine(
        model_path=asked.model,
        device=asked.device,
        dtype="bfloat16",
        attention_backend=asked.backends,
        page_size=64,
        context_length=max(tokens for _, tokens in shapes) + 1024,
        max_total_tokens=max(slots, 32 * (asked.longest_prompt + 256)),
        max_running_requests=most,
        mem_fraction_static=0.6,
        grammar_backend="none",
        sampling_backend="pytorch",
        random_seed=0,
        log_level="info",
        mm_feature_transport="cpu",
        **graph_arguments(asked, sorted({1, 4, 16, 32, *(requests for requests, _ in shapes)})),
    )
    answered = answers(engine, asked.longest_prompt)
    steps = {
        f"{requests}x{tokens}": time_steps(engine, requests, tokens, asked.steps, asked.repeats)
        for requests, tokens in shapes
    }
    engine.shutdown()
    return {"answers": answered, "steps": steps}


def graph_arguments(asked: argparse.Namespace, batch_sizes: list[int]) -> dict[str, Any]:
    """Prompts run without graphs for every backend: they are not what is measured."""
    if asked.device == "cpu":
        return {"json_model_override_args": json.dumps(idle_yarn())}
    if asked.eager:
        return {"disable_prefill_cuda_graph": True, "disable_decode_cuda_graph": True}
    return {
        "disable_prefill_cuda_graph": True,
        "cuda_graph_max_bs_decode": batch_sizes[-1],
        "cuda_graph_bs_decode": batch_sizes,
    }


def idle_yarn() -> dict[str, Any]:
    from flashmla_backend.sglang_engine import IDLE_YARN

    return IDLE_YARN


def answers(engine: Any, longest: int) -> list[dict[str, Any]]:
    """Greedy answers to 32 prompts at once: token ids and their logprobs."""
    chosen = random.Random(0)
    prompts = [prompt(chosen.randint(1, longest), seed) for seed in range(32)]
    sampling = {"temperature": 0, "max_new_tokens": ANSWER_TOKENS, "ignore_eos": True}
    outputs = engine.generate(input_ids=prompts, sampling_params=sampling, return_logprob=True)
    found = [output["meta_info"]["output_token_logprobs"] for output in outputs]  # (logprob, id, text) of each token
    return [{"ids": [t[1] for t in tokens], "logprobs": [t[0] for t in tokens]} for tokens in found]


def time_steps(engine: Any, requests: int, tokens: int, steps: int, repeats: int) -> dict[str, Any]:
    """Milliseconds of a decode step, median and all repeats."""
    prompts = [prompt(tokens, 1000 + seed) for seed in range(requests)]

    def seconds(new_tokens: int) -> float:
        sampling = {"temperature": 0, "max_new_tokens": new_tokens, "ignore_eos": True}
        started = time.perf_counter()
        outputs = engine.generate(input_ids=prompts, sampling_params=sampling)
        taken = time.perf_counter() - started
        assert all(len(output["output_ids"]) == new_tokens for output in outputs)
        return taken

    seconds(1), seconds(steps)  # fills the prefix cache
    taken = [(seconds(1 + steps) - seconds(1)) / steps * 1e3 for _ in range(repeats)]
    return {"median_ms": statistics.median(taken), "all_ms": taken}


def prompt(length: int, seed: int) -> list[int]:
    return random.Random(f"{length} {seed}").choices(range(FIRST_TEXT_TOKEN, LAST_TEXT_TOKEN), k=length)


def compare(first: list[dict[str, Any]], second: list[dict[str, Any]]) -> dict[str, float]:
    """Logprob differences of the tokens that both chose, up to where the answers part."""
    differences, same = [], 0
    for a, b in zip(first, second, strict=True):
        both = [*takewhile(lambda pair: pair[0] == pair[1], zip(a["ids"], b["ids"], strict=True))]
        same += len(both)
        pairs = zip(a["logprobs"][: len(both)], b["logprobs"][: len(both)], strict=True)
        differences += [abs(x - y) for x, y in pairs]
    return {
        "tokens_compared": same,
        "tokens": len(first) * ANSWER_TOKENS,
        "mean": statistics.fmean(differences),
        "max": max(differences),
    }


def print_report(report: dict[str, Any], backends: list[str]) -> None:
    for backend, seen in report["compared"].items():
        print(
            f"{backend} against {backends[0]}: {seen['tokens_compared']} of {seen['tokens']} tokens before the answers "
            f"part; logprobs differ by {seen['mean']:.4f} in the mean, {seen['max']:.4f} at most"
        )
    runs = {backend: run["steps"] for backend, run in report["runs"].items()}
    shapes: dict[str, Any] = next(iter(runs.values()), {})
    print("ms a step".ljust(12) + "".join(backend.rjust(12) for backend in runs))
    for shape in shapes:
        print(shape.ljust(12) + "".join(f"{steps[shape]['median_ms']:12.2f}" for steps in runs.values()))


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TORCH_COMPILE_DISABLE", "1")
    sys.exit(main())
