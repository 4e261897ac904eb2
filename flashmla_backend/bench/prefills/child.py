"""One backend, one model, one process: `python -m flashmla_backend.bench.prefills.child request.json answer.json`.

request: {"model": folder, "attention_backend": name, "dtype": name, "repeats": number,
          "points": [{"context": tokens in the cache, "requests": number, "new": tokens of each,
                      "contenders": {name: threshold, null to keep the backend's own}}, ...],
          "engine": more keyword arguments of vllm.LLM}
answer: {"impl": class of the layers' attention,
         "rows": [{"context", "requests", "new", contender: {"ms", "least_ms", "step_ms", "decoded"}}, ...]}

Says `@ what` on standard output before everything that takes its time.
"""

from __future__ import annotations

import json
import os
import random
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flashmla_backend.bench.child import say, write_answer
from flashmla_backend.bench.prefills.threshold import DecodedTokens, set_threshold
from flashmla_backend.bench.steps.child import BLOCK_SIZE, implementation
from flashmla_backend.bench.steps.models import LOAD_FORMAT, register_loader

CHUNK = 16384  # tokens of a step while contexts are computed


def start(request: dict[str, Any]) -> Any:
    """A vllm.LLM that computes every point in one step and keeps the contexts of all requests in its cache."""
    from vllm import LLM

    register_loader()
    points = request["points"]
    longest = max(point["context"] + point["new"] for point in points) + 1  # with the answer
    requests = max(point["requests"] for point in points)
    contexts = {point["context"] for point in points}
    # Old prompts' pages are evicted before contexts, which every call touches: two calls' worth of them is enough. A
    # context that is lost all the same, while fewer requests are measured, comes back in the turn that is not measured.
    tails = 2 * (1 + -(-(1 + max(point["new"] for point in points)) // BLOCK_SIZE))
    return LLM(
        model=request["model"],
        load_format=LOAD_FORMAT,
        skip_tokenizer_init=True,
        dtype=request["dtype"],
        attention_backend=request["attention_backend"],
        block_size=BLOCK_SIZE,
        max_model_len=longest,
        max_num_seqs=requests,
        max_num_batched_tokens=max(
            *(point["requests"] * point["new"] for point in points), min(CHUNK, max(contexts)), requests
        ),
        num_gpu_blocks_override=requests * (sum(contexts) // BLOCK_SIZE + tails) + 64,
        enable_prefix_caching=True,
        disable_log_stats=True,
        seed=0,
        **request["engine"],
    )


@dataclass(frozen=True)
class Answered:
    """Some prompts' first tokens."""

    ms: float  # from the handing over of the first prompt
    step_ms: float  # from the end of the handing over: page hashes of long prompts take the host a while
    steps: int  # that ended with answers
    cached: list[int]  # tokens of each prompt that were found in the cache
    decoded: int  # tokens


class ShortPrefills:
    """A vllm.LLM in this process that is given prompts behind contexts."""

    def __init__(self, llm: Any, points: list[dict[str, Any]]):
        self.llm = llm
        self.decoded = DecodedTokens(llm)
        self.draw = random.Random(0)
        self.vocabulary = llm.llm_engine.vllm_config.model_config.get_vocab_size()
        self.asked = 0
        most = max(point["requests"] for point in points)
        lengths = dict.fromkeys(point["context"] for point in points)
        self.contexts = {length: [self.tokens(length) for _ in range(most)] for length in lengths}

    def tokens(self, count: int) -> list[int]:
        return self.draw.choices(range(self.vocabulary), k=count)

    def answer(self, prompts: list[list[int]]) -> Answered:
        """All prompts at once, one token each."""
        from vllm import SamplingParams

        sampling = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True, detokenize=False)
        engine, outputs, steps = self.llm.llm_engine, [], 0
        self.decoded.count = 0
        begin = time.perf_counter()
        for prompt in prompts:
            engine.add_request(str(self.asked), {"prompt_token_ids": prompt}, sampling)
            self.asked += 1
        added = time.perf_counter()
        while engine.has_unfinished_requests():
            answered = engine.step()
            outputs += answered
            steps += bool(answered)
        end = time.perf_counter()
        cached = [output.num_cached_tokens or 0 for output in outputs]
        return Answered((end - begin) * 1e3, (end - added) * 1e3, steps, cached, self.decoded.count)

    def fill(self, length: int) -> None:
        """Puts the contexts of that length into the cache."""
        for context in self.contexts[length]:
            self.answer([context])

    def measure(self, point: dict[str, Any], repeats: int) -> dict[str, Any]:
        """A row of the answer. Contenders take turns, so that drift hits all alike; a first turn is not measured.

        Raises RuntimeError as `check` does.
        """
        context, requests, new = point["context"], point["requests"], point["new"]
        answers: dict[str, list[Answered]] = {name: [] for name in point["contenders"]}
        for repeat in range(repeats + 1):
            for name, threshold in point["contenders"].items():
                prompts = [cached + self.tokens(new) for cached in self.contexts[context][:requests]]
                if threshold is not None:
                    set_threshold(self.llm, threshold)
                answered = self.answer(prompts)
                if repeat:
                    check(answered, point, name)
                    answers[name].append(answered)
        row: dict[str, Any] = {"context": context, "requests": requests, "new": new}
        return row | {name: summarise(calls) for name, calls in answers.items()}


def check(answered: Answered, point: dict[str, Any], name: str) -> None:
    """Raises RuntimeError if contexts were not in the cache, if it took several steps, or if not all prompts were
    decoded that should be, and no others."""
    context, requests, new = point["context"], point["requests"], point["new"]
    threshold = point["contenders"][name]
    where = f"{name}, {requests} requests of {context} + {new} tokens"
    if answered.cached != [context] * requests:
        raise RuntimeError(f"{where}: {answered.cached} tokens were cached")
    if answered.steps != 1:
        raise RuntimeError(f"{where}: {answered.steps} steps instead of one")
    everything = requests * new
    if answered.decoded not in ((0, everything) if threshold is None else (everything * (new <= threshold),)):
        raise RuntimeError(f"{where}: {answered.decoded} of {everything} tokens were decoded, threshold {threshold}")


def summarise(calls: list[Answered]) -> dict[str, Any]:
    """Calls that are all decoded or all prefilled, as `check` sees to for a threshold."""
    return {
        "ms": round(statistics.median(call.ms for call in calls), 4),
        "least_ms": round(min(call.ms for call in calls), 4),
        "step_ms": round(statistics.median(call.step_ms for call in calls), 4),
        "decoded": all(call.decoded for call in calls),
    }


def main(request_path: str, answer_path: str) -> None:
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    request = json.loads(Path(request_path).read_text())
    say("starting")
    llm = start(request)
    answer: dict[str, Any] = {"impl": implementation(llm), "rows": []}
    prefills, filled = ShortPrefills(llm, request["points"]), 0
    for point in request["points"]:
        if point["context"] != filled:
            filled = point["context"]
            say(f"contexts of {filled} tokens")
            prefills.fill(filled)
        say(f"{point['requests']} x {point['new']} tokens behind {point['context']}")
        answer["rows"].append(prefills.measure(point, request["repeats"]))
        write_answer(answer_path, answer)
    say("done")
    sys.stdout.flush()
    os._exit(0)  # an engine in this process may take long to take down


if __name__ == "__main__":
    main(*sys.argv[1:])
