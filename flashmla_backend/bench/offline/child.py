"""One backend, one model, one process: `python -m flashmla_backend.bench.offline.child request.json answer.json`.

request: {"model": folder, "attention_backend": name, "dtype": name, "lengths": [[of a prompt, of its answer], ...],
          "at_once": requests, "batched_tokens": of a step or null, "rounds": number,
          "engine": more keyword arguments of vllm.LLM}
answer: {"impl": class of the layers' attention, "batched_tokens": of a step,
         "rounds": [{"seconds", "steps": {kind: {count, seconds, median_ms}}}, ...]}

Says `@ what` on standard output before everything that takes its time.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from flashmla_backend.bench.child import say, write_answer
from flashmla_backend.bench.offline.clock import StepClock
from flashmla_backend.bench.offline.job import draw_prompts
from flashmla_backend.bench.steps.child import BLOCK_SIZE, implementation
from flashmla_backend.bench.steps.models import LOAD_FORMAT, register_loader


def start(request: dict[str, Any]) -> Any:
    """A vllm.LLM with pages for all requests that run at once, so that none is preempted."""
    from vllm import LLM

    register_loader()
    longest = max(map(sum, request["lengths"]))
    return LLM(
        model=request["model"],
        load_format=LOAD_FORMAT,
        skip_tokenizer_init=True,
        dtype=request["dtype"],
        attention_backend=request["attention_backend"],
        block_size=BLOCK_SIZE,
        max_model_len=longest,
        max_num_seqs=request["at_once"],
        max_num_batched_tokens=request["batched_tokens"],
        num_gpu_blocks_override=request["at_once"] * (-(-longest // BLOCK_SIZE) + 1) + 64,
        enable_prefix_caching=False,  # every prompt is prefilled
        seed=0,
        **request["engine"],
    )


def work(llm: Any, clock: StepClock, lengths: list[tuple[int, int]], number: int) -> dict[str, Any]:
    """One round: all prompts at once, until the last answer is there. Raises RuntimeError if one is too short."""
    from vllm import SamplingParams

    vocabulary = llm.llm_engine.vllm_config.model_config.get_vocab_size()
    prompts = draw_prompts([tokens for tokens, _ in lengths], vocabulary, seed=number)
    sampling = [
        SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False) for _, tokens in lengths
    ]
    begin = time.perf_counter()
    clock.restart()
    outputs = llm.generate([{"prompt_token_ids": ids} for ids in prompts], sampling, use_tqdm=False)
    seconds = time.perf_counter() - begin
    for request, (output, (_, wanted)) in enumerate(zip(outputs, lengths, strict=True)):
        if (got := len(output.outputs[0].token_ids)) != wanted:
            raise RuntimeError(f"round {number}: request {request} was answered by {got} tokens instead of {wanted}")
    return {"seconds": round(seconds, 4), "steps": clock.summary()}


def main(request_path: str, answer_path: str) -> None:
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    request = json.loads(Path(request_path).read_text())
    say("starting")
    llm, clock = start(request), StepClock()
    clock.watch(llm)
    scheduling = llm.llm_engine.vllm_config.scheduler_config
    answer: dict[str, Any] = {
        "impl": implementation(llm),
        "batched_tokens": scheduling.max_num_batched_tokens,
        "rounds": [],
    }
    say("warming up")
    work(llm, clock, request["lengths"], 0)
    for number in range(1, request["rounds"] + 1):
        say(f"round {number}")
        answer["rounds"].append(work(llm, clock, request["lengths"], number))
        write_answer(answer_path, answer)
    say("done")
    sys.stdout.flush()
    os._exit(0)  # an engine in this process may take long to take down


if __name__ == "__main__":
    main(*sys.argv[1:])
