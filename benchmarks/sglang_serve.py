"""SGLang's real server on one GPU, with and without CUDA graphs: many streamed requests, no errors, same logprobs.

    python benchmarks/sglang_serve.py --out sglang-serve.json

For every mode and backend a server of a DeepSeek-V2-Lite-shaped model, its weights drawn on the device. The requests,
prompts of mixed lengths, are streamed all at once, twice: first to warm up, then to be counted and compared with the
first backend's, and that backend's modes with one another. The report is written after every server. Exit code 1 if a
server or a request failed, or the logprobs of a token differ by more than --bound in the mean.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import runpy
import sys
import tempfile
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import sglang_common as common
import torch

from flashmla_backend import tokenizer
from flashmla_backend.bench import machine
from flashmla_backend.bench.provenance import provenance, write
from flashmla_backend.bench.serve.engine import OUR_LINE
from flashmla_backend.bench.servers import HttpServer, ServerFailed, free_port, running
from flashmla_backend.bench.steps.models import write_config
from flashmla_backend.sglang_engine import IDLE_YARN, distribution

common.prepare()

GRAPHS_IN_LOG = ("cuda graph: True", "cuda_graph: True")  # what SGLang says of a decode step that ran in one


@dataclass
class Run:
    """What one server answered."""

    answers: list[common.Answer] = field(default_factory=list)
    measured: dict[str, Any] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backends", default="triton,ours", help="as for sglang_decode.py; the first is compared with")
    parser.add_argument("--modes", default="graph,eager")
    parser.add_argument("--model", default="v2-lite", help="v2-lite, v3-attention or tiny")
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--longest-prompt", type=int, default=1024, help="tokens; the shortest has 1")
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--cached-tokens", type=int, default=131072, help="that the cache holds")
    common.add_options(parser, "sglang-serve", limit_s=150, bound=0.5)
    return parser.parse_args()


def main() -> int:
    asked = arguments()
    backends, modes = asked.backends.split(","), asked.modes.split(",")
    report: dict[str, Any] = {
        **provenance(machine.describe(torch.device(asked.device))[0], sys.argv, asked.commit),
        "sglang": distribution(),
        **{name: getattr(asked, name) for name in ("model", "requests", "longest_prompt", "new_tokens")},
        "runs": {},
        "compared": {},
        "notes": [],
    }
    lengths = random.Random(0)
    prompts = [common.prompt(lengths.randint(1, asked.longest_prompt), seed) for seed in range(asked.requests)]
    runs: dict[tuple[str, str], Run] = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = write_config(asked.model, "bfloat16", context_of(asked), Path(scratch) / asked.model)
        tokenizer.write_tokenizer(folder)
        for mode in modes:
            for backend in backends:
                run = runs[backend, mode] = serve(asked, folder, backend, mode, prompts)
                name = f"{backend}, {mode}"
                report["runs"][name] = run.measured
                report["notes"] += [f"{name}: {problem}" for problem in run.problems]
                report["compared"] = comparisons(runs, backends, modes)
                write(report, asked.out)
                print(name, json.dumps(run.measured), *run.problems, flush=True)
    report["notes"] += common.far_off(report["compared"], asked.bound)
    write(report, asked.out)
    for name, compared in report["compared"].items():
        print(f"{name}: {common.words(compared)}")
    print("\n".join(report["notes"]) or f"{len(runs)} servers, no errors")
    return 1 if report["notes"] else 0


def serve(asked: argparse.Namespace, folder: Path, backend: str, mode: str, prompts: list[list[int]]) -> Run:
    """Starts a server, asks it everything twice, and ends it."""
    run, log, started = Run(), asked.logs / f"{backend}-{mode}.log", time.monotonic()
    selected, environment = common.selection(backend)
    port = free_port()
    command = [sys.executable, __file__, "--server", "--model-path", str(folder), "--port", str(port)]
    for name, value in {**server_arguments(asked, mode), **selected}.items():
        command += [f"--{name.replace('_', '-')}", *([] if value is True else str(value).split("\n"))]
    server = HttpServer(command, {**os.environ, **environment}, f"http://127.0.0.1:{port}", log)
    try:
        with running(server, asked.limit):
            run.measured["start_seconds"] = round(time.monotonic() - started, 1)
            for _ in ("warm-up", "counted"):
                begin = time.monotonic()
                results = ask_all(server.url, prompts, asked.new_tokens, max(1.0, asked.limit - (begin - started)))
                seconds = time.monotonic() - begin
    except ServerFailed as failure:
        run.problems.append(str(failure))
        return run
    said = log.read_text(errors="replace")
    run.answers = [result if isinstance(result, dict) else {"ids": [], "logprobs": []} for result in results]
    errors = [f"request {number}: {result}" for number, result in enumerate(results) if isinstance(result, str)]
    ours = OUR_LINE.search(said)
    run.measured |= {
        "errors": len(errors),
        "seconds": round(seconds, 3),
        "tokens_per_second": round(sum(len(answer["ids"]) for answer in run.answers) / seconds, 1),
        "served_by": ours[0] if ours else backend,
        "steps_in_graphs": sum(any(words in line for words in GRAPHS_IN_LOG) for line in said.splitlines()),
    }
    run.problems += errors[:5]
    if bool(ours) != (backend == common.OURS):
        run.problems.append(f"served by {run.measured['served_by']} ({log})")
    return run


def server_arguments(asked: argparse.Namespace, mode: str) -> dict[str, Any]:
    made: dict[str, Any] = {
        "host": "127.0.0.1",
        "device": asked.device,
        "dtype": "bfloat16",
        "load_format": "dummy",
        "page_size": 64,
        "context_length": context_of(asked),
        "max_total_tokens": asked.cached_tokens,
        "max_running_requests": asked.requests + 1,  # a prompt that is cut in two counts twice
        "mem_fraction_static": 0.8,
        "disable_radix_cache": True,
        "skip_server_warmup": True,
        "grammar_backend": "none",
        "sampling_backend": "pytorch",
        "mm_feature_transport": "cpu",
        "random_seed": 0,
    }
    if asked.device == "cpu":
        return made | {"json_model_override_args": json.dumps(IDLE_YARN)}
    made["disable_prefill_cuda_graph"] = True
    if mode == "eager":
        return made | {"disable_decode_cuda_graph": True}
    sizes = sorted({1, 2, 4, 8, 16, 32, asked.requests})
    return made | {"cuda_graph_max_bs_decode": sizes[-1], "cuda_graph_bs_decode": "\n".join(map(str, sizes))}


def context_of(asked: argparse.Namespace) -> int:
    return int(asked.longest_prompt + asked.new_tokens + 64)


def ask_all(url: str, prompts: list[list[int]], new_tokens: int, seconds: float) -> list[common.Answer | str]:
    """All at once."""
    with ThreadPoolExecutor(len(prompts)) as clients:
        return [*clients.map(lambda prompt: ask(url, prompt, new_tokens, seconds), prompts)]


def ask(url: str, prompt: list[int], new_tokens: int, seconds: float) -> common.Answer | str:
    """One streamed request; an error in words."""
    sampling = {"temperature": 0, "max_new_tokens": new_tokens, "ignore_eos": True}
    body = {"input_ids": prompt, "sampling_params": sampling, "return_logprob": True, "stream": True}
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"{url}/generate", json.dumps(body).encode(), headers)
    last, pieces, ended = b"", 0, False
    try:
        with urllib.request.urlopen(request, timeout=seconds) as response:
            for line in response:
                if line.startswith(b"data: [DONE]"):
                    ended = True
                elif line.startswith(b"data: "):
                    last, pieces = line.removeprefix(b"data: "), pieces + 1
        answer = common.answer_of(json.loads(last))
    except (OSError, ValueError, KeyError) as error:
        return f"{error!r}, the last piece of the stream: {last[:200]!r}"
    if len(answer["ids"]) != new_tokens or pieces < 2 or not ended:
        return f"{len(answer['ids'])} tokens of {new_tokens} in {pieces} pieces, {'ended' if ended else 'cut off'}"
    return answer


def comparisons(runs: dict[tuple[str, str], Run], backends: list[str], modes: list[str]) -> dict[str, dict[str, float]]:
    """The others with the first backend in each mode, and the first backend's modes with one another."""
    pairs = [((backend, mode), (backends[0], mode)) for mode in modes for backend in backends[1:]]
    pairs += [((backends[0], mode), (backends[0], modes[0])) for mode in modes[1:]]
    return {
        f"{' '.join(one)} against {' '.join(other)}": common.compare(runs[other].answers, runs[one].answers)
        for one, other in pairs
        if one in runs and other in runs and runs[one].answers and runs[other].answers
    }


if __name__ == "__main__":
    if sys.argv[1:2] == ["--server"]:
        del sys.argv[1]
        runpy.run_module("sglang.launch_server", run_name="__main__")
    else:
        sys.exit(main())
