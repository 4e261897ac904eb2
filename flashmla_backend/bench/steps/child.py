"""One backend, one model, one process: `python -m flashmla_backend.bench.steps.child request.json answer.json`.

request: {"model": folder, "attention_backend": name, "dtype": name, "points": {name: [tokens in the cache, ...]},
          "warmup": steps, "windows": number, "window": steps, "compared": requests whose answers are,
          "new_tokens": of each of them, "engine": more keyword arguments of vllm.LLM}
answer: {"impl": class of the layers' attention, "rows": {point: {ms, least_ms, gpu_ms, attention_ms, kernels}},
         "tokens": [[ids, ...], ...], "logprobs": [[of these ids, ...], ...]}

Says `@ what` on standard output before everything that takes its time.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch

from flashmla_backend.bench.child import say, write_answer
from flashmla_backend.bench.steps.kernels import attention_us, busiest, busy_us, traced_launches
from flashmla_backend.bench.steps.models import LOAD_FORMAT, register_loader

BLOCK_SIZE = 64
TRACED_STEPS = 4
COMPARED_TOKENS = 512  # context of the comparison of answers


class Steps:
    """An engine in this process that is stepped by hand."""

    def __init__(self, request: dict[str, Any]):
        from vllm import LLM

        register_loader()
        self.request = request
        self.steps = request["warmup"] + request["windows"] * request["window"] + TRACED_STEPS
        batches = [*request["points"].values(), [COMPARED_TOKENS] * request["compared"]]
        most_steps = max(self.steps, request["new_tokens"]) + 2
        self.llm = LLM(
            model=request["model"],
            load_format=LOAD_FORMAT,
            skip_tokenizer_init=True,
            dtype=request["dtype"],
            attention_backend=request["attention_backend"],
            block_size=BLOCK_SIZE,
            max_model_len=max(map(max, batches)) + most_steps,
            max_num_seqs=max(map(len, batches)),
            num_gpu_blocks_override=max(
                sum(-(-(length + most_steps) // BLOCK_SIZE) for length in batch) for batch in batches
            )
            + 64,
            enable_prefix_caching=False,  # every request its own pages
            disable_log_stats=True,
            seed=0,
            kv_transfer_config={
                "kv_connector": "DecodeBenchConnector",
                "kv_role": "kv_both",
                "kv_connector_extra_config": {"fill_mean": 0.0, "fill_std": 1.0},
            },
            **request["engine"],
        )
        self.requests = 0

    def add(self, lengths: list[int], new_tokens: int, given: bool = False) -> None:
        """Requests whose caches hold all but the last of `lengths` tokens when the first step begins.

        given: each can only answer one token, over and over, and says how likely that was. So contexts stay the same,
            whatever the backend.
        """
        from vllm import SamplingParams

        torch.manual_seed(0)  # the rows of the caches come from torch's own generator
        for length in lengths:
            *prompt, after = (10 + (7 * self.requests + i) % 100 for i in range(max(2, length) + 1))
            sampling = SamplingParams(
                temperature=0,
                max_tokens=new_tokens,
                ignore_eos=True,
                detokenize=False,
                logprobs=1 if given else None,
                allowed_token_ids=[after] if given else None,
            )
            self.llm.llm_engine.add_request(str(self.requests), {"prompt_token_ids": prompt}, sampling)
            self.requests += 1

    def run(self, steps: int) -> float:
        """Seconds of so many steps, counted by their outputs: asynchronous scheduling may only start one in a call."""
        begin, engine = time.perf_counter(), self.llm.llm_engine
        while steps and engine.has_unfinished_requests():
            steps -= bool(engine.step())
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter() - begin

    def measure(self, lengths: list[int]) -> dict[str, Any]:
        """Milliseconds of a step: median and least of the windows; then what the GPU does in it, from a trace."""
        window = self.request["window"]
        self.add([length - self.steps // 2 for length in lengths], self.steps + 1)
        self.run(self.request["warmup"])
        times = [self.run(window) / window * 1e3 for _ in range(self.request["windows"])]
        row: dict[str, Any] = {"ms": round(statistics.median(times), 4), "least_ms": round(min(times), 4)}
        if torch.cuda.is_available():
            launches = traced_launches(lambda: self.run(TRACED_STEPS))
            row["gpu_ms"] = round(busy_us(launches) / TRACED_STEPS / 1e3, 4)
            row["attention_ms"] = round(attention_us(launches) / TRACED_STEPS / 1e3, 4)
            row["kernels"] = {name[:120]: round(us / TRACED_STEPS, 1) for name, us in busiest(launches, 12)}
        while self.llm.llm_engine.has_unfinished_requests():
            self.run(1)
        return row

    def answers(self) -> tuple[list[list[int]], list[list[float]]]:
        """Tokens after the same contexts, and the logarithm of the probability that the model gave to each."""
        self.add([COMPARED_TOKENS] * self.request["compared"], self.request["new_tokens"], given=True)
        finished: dict[int, Any] = {}
        while self.llm.llm_engine.has_unfinished_requests():
            for output in self.llm.llm_engine.step():
                if output.finished:
                    finished[int(output.request_id)] = output.outputs[0]
        ordered = [finished[number] for number in sorted(finished)]
        tokens = [list(output.token_ids) for output in ordered]
        logprobs = [
            [step[token].logprob for step, token in zip(output.logprobs, output.token_ids, strict=True)]
            for output in ordered
        ]
        return tokens, logprobs


def implementation(llm: Any) -> str:
    """The class that answers for attention in all layers of a vllm.LLM."""
    layers = llm.llm_engine.vllm_config.compilation_config.static_forward_context.values()
    (impl,) = {type(layer.impl) for layer in layers if hasattr(layer, "impl")}
    return f"{impl.__module__}.{impl.__qualname__}"


def main(request_path: str, answer_path: str) -> None:
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    request = json.loads(Path(request_path).read_text())
    say("starting")
    engine = Steps(request)
    answer: dict[str, Any] = {"impl": implementation(engine.llm), "rows": {}}
    say("answers")
    answer["tokens"], answer["logprobs"] = engine.answers()
    write_answer(answer_path, answer)
    for name, lengths in request["points"].items():
        say(name)
        answer["rows"][name] = engine.measure(lengths)
        write_answer(answer_path, answer)
    say("done")
    sys.stdout.flush()
    os._exit(0)  # an engine in this process may take long to take down


if __name__ == "__main__":
    main(*sys.argv[1:])
