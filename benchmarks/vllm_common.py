"""What the benchmarks of vLLM share: an engine in a process of its own, answered for by the backend that was asked for.

That process is this file: `python vllm_common.py request.json answer.json`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

from flashmla_backend.bench import backends

LIMIT_S = 150  # of one engine, its start included
GRAPHS = {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"}

Asked = tuple[list[int], int]  # a prompt's token ids, and how many tokens to answer
Answer = dict[str, Any]  # {"tokens": [...], "logprobs": [...]}, the logprob of each of these tokens


class Answered(NamedTuple):
    """What an engine did."""

    batches: list[list[Answer]]
    served_by: str  # the line in which our backend says how it serves, empty if it does not
    counters: dict[str, float]  # vLLM's own, by name


def answers_of(
    name: str,
    backend: str,
    engine: dict[str, Any],
    batches: list[list[Asked]],
    scratch: Path,
    environment: dict[str, str] | None = None,
) -> Answered:
    """Starts vLLM once and has it answer one batch after the other, greedily.

    name: of the log that is left in the current folder.
    engine: arguments of vllm.LLM beside the backend.
    Raises RuntimeError if ours did not serve though asked for, or did though not; CalledProcessError, TimeoutExpired.
    """
    selected, selecting = backends.selection(backend)
    request, answer, log = scratch / "request.json", scratch / "answer.json", Path(f"{name.replace(', ', '-')}.log")
    answer.unlink(missing_ok=True)
    request.write_text(json.dumps({"engine": {**engine, "attention_backend": selected}, "batches": batches}))
    with log.open("w") as file:
        subprocess.run(
            [sys.executable, __file__, str(request), str(answer)],
            env={**os.environ, **selecting, **(environment or {})},
            stdout=file,
            stderr=subprocess.STDOUT,
            timeout=LIMIT_S,
            check=True,
        )
    served = [line.strip() for line in log.read_text().splitlines() if "serves MLA decode" in line]
    if (backend == backends.OURS) != bool(served):
        raise RuntimeError(f"{name}: our backend {'did not serve' if not served else 'served'}, see {log}")
    said = served[-1][served[-1].find("flashmla_backend") :] if served else ""
    return Answered(served_by=said, **json.loads(answer.read_text()))


def child(request_path: str, answer_path: str) -> None:
    from vllm import LLM, SamplingParams

    request = json.loads(Path(request_path).read_text())
    llm = LLM(**request["engine"], disable_log_stats=False)  # counters

    def sampling(new_tokens: int) -> SamplingParams:
        return SamplingParams(temperature=0, max_tokens=new_tokens, ignore_eos=True, detokenize=False, logprobs=1)

    batches = []
    for batch in request["batches"]:
        prompts = [{"prompt_token_ids": ids} for ids, _ in batch]
        outputs = llm.generate(prompts, [sampling(new_tokens) for _, new_tokens in batch], use_tqdm=False)
        batches.append([answer_of(output.outputs[0]) for output in outputs])
    counters = {metric.name: metric.value for metric in llm.get_metrics() if hasattr(metric, "value")}
    Path(answer_path).write_text(json.dumps({"batches": batches, "counters": counters}))


def answer_of(completion: Any) -> Answer:
    tokens = list(completion.token_ids)
    logprobs = [step[token].logprob for step, token in zip(completion.logprobs, tokens, strict=True)]
    return {"tokens": tokens, "logprobs": logprobs}


if __name__ == "__main__":
    child(*sys.argv[1:])
