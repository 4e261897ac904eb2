"""SGLang's decode on one GPU with different attention backends: the same logprobs? how long a step?

    python benchmarks/sglang_decode.py --backends triton,flashmla,ours --out sglang-decode.json

Backends: `ours`, `flashmla` (SGLang's own decode, prompts on Triton) and others by SGLang's names. One engine per
backend, in processes of its own with a time limit, on the same locally made DeepSeek-V2-shaped model of many thin
layers (an engine's step of a small model is bound by the host). First correctness: 32 prompts of mixed lengths, decoded
greedily; backends are compared with the first over the tokens up to where their answers part. Then the time of a step:
decoding N tokens less decoding one, from a filled prefix cache, in CUDA graphs unless --eager. The report is written
after every backend. Exit code 1 if one of them failed, or its logprobs differ by more than --bound in the mean.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import sglang_common as common
import torch

from flashmla_backend.bench import machine
from flashmla_backend.bench.provenance import provenance, write
from flashmla_backend.sglang_engine import IDLE_YARN, distribution

common.prepare()

ANSWER_TOKENS = 64


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backends", default="triton,flashmla,ours")
    parser.add_argument("--layers", type=int, default=48)
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--shapes", default="1x8192,16x8192,64x4096", help="requests x tokens in the cache")
    parser.add_argument("--steps", type=int, default=128, help="decode steps that are timed")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--longest-prompt", type=int, default=1500)
    parser.add_argument("--eager", action="store_true")
    common.add_options(parser, "sglang-decode", limit_s=180, bound=0.5)
    common.add_child_options(parser)
    return parser.parse_args()


def main() -> int:
    asked = arguments()
    if asked.run:
        measure(asked)
        return 0
    folder = Path(tempfile.mkdtemp())
    model = common.make_dense_model(folder / "model", asked.layers, asked.heads)
    device = machine.describe(torch.device(asked.device))[0]
    report: dict[str, Any] = {
        **provenance(device, sys.argv, asked.commit),
        "sglang": distribution(),
        **{name: getattr(asked, name) for name in ("layers", "heads", "steps", "repeats", "eager")},
        "runs": {},
        "compared": {},
        "notes": [],
    }
    backends = asked.backends.split(",")
    answers: dict[str, list[common.Answer]] = {}
    for number, backend in enumerate(backends):
        answer = folder / f"{number}.json"
        command = [*sys.argv, "--backends", backend, "--run", str(answer), "--model", str(model)]
        found, problem = common.run_child(backend, backend, command, answer, asked.logs, asked.limit)
        if "answers" in found:
            answers[backend] = found["answers"]
            report["runs"][backend] = {"steps": found["steps"]}
            if backend != backends[0] and backends[0] in answers:
                report["compared"][backend] = common.compare(answers[backends[0]], answers[backend])
        if problem:
            report["notes"].append(f"{backend}: {problem}")
        write(report, asked.out)
    report["notes"] += common.far_off(report["compared"], asked.bound)
    write(report, asked.out)
    print_report(report, backends)
    return 1 if report["notes"] else 0


def measure(asked: argparse.Namespace) -> None:
    """Answers and step times of one backend into the file `asked.run`, written after each shape."""
    from sglang.srt.entrypoints.engine import Engine

    shapes = [tuple(map(int, shape.split("x"))) for shape in asked.shapes.split(",")]
    slots = max(requests * (tokens + asked.steps + 128) for requests, tokens in shapes)
    most = max(32, *(requests for requests, _ in shapes))
    engine = Engine(
        model_path=asked.model,
        device=asked.device,
        dtype="bfloat16",
        **common.selection(asked.backends)[0],
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
    done: dict[str, Any] = {"answers": answers(engine, asked.longest_prompt), "steps": {}}
    for requests, tokens in shapes:
        Path(asked.run).write_text(json.dumps(done))
        done["steps"][f"{requests}x{tokens}"] = time_steps(engine, requests, tokens, asked.steps, asked.repeats)
    Path(asked.run).write_text(json.dumps(done))
    engine.shutdown()


def graph_arguments(asked: argparse.Namespace, batch_sizes: list[int]) -> dict[str, Any]:
    """Prompts run without graphs for every backend: they are not what is measured."""
    if asked.device == "cpu":
        return {"json_model_override_args": json.dumps(IDLE_YARN)}
    if asked.eager:
        return {"disable_prefill_cuda_graph": True, "disable_decode_cuda_graph": True}
    return {
        "disable_prefill_cuda_graph": True,
        "cuda_graph_max_bs_decode": batch_sizes[-1],
        "cuda_graph_bs_decode": batch_sizes,
    }


def answers(engine: Any, longest: int) -> list[common.Answer]:
    """Greedy answers to 32 prompts at once."""
    chosen = random.Random(0)
    prompts = [common.prompt(chosen.randint(1, longest), seed) for seed in range(32)]
    sampling = {"temperature": 0, "max_new_tokens": ANSWER_TOKENS, "ignore_eos": True}
    outputs = engine.generate(input_ids=prompts, sampling_params=sampling, return_logprob=True)
    return [common.answer_of(output) for output in outputs]


def time_steps(engine: Any, requests: int, tokens: int, steps: int, repeats: int) -> dict[str, Any]:
    """Milliseconds of a decode step, median and all repeats."""
    prompts = [common.prompt(tokens, 1000 + seed) for seed in range(requests)]

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


def print_report(report: dict[str, Any], backends: list[str]) -> None:
    for note in report["notes"]:
        print(note)
    for backend, seen in report["compared"].items():
        print(f"{backend} against {backends[0]}: {common.words(seen)}")
    runs = {backend: run["steps"] for backend, run in report["runs"].items()}
    shapes = dict.fromkeys(shape for steps in runs.values() for shape in steps)
    print("ms a step".ljust(12) + "".join(backend.rjust(12) for backend in runs))
    for shape in shapes:
        times = (f"{steps[shape]['median_ms']:12.3f}" if shape in steps else " " * 12 for steps in runs.values())
        print(shape.ljust(12) + "".join(times))


if __name__ == "__main__":
    sys.exit(main())
