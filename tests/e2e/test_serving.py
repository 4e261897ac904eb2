"""The product as it is used: requests over HTTP to `flashmla serve`, answered by our backend."""

from __future__ import annotations

import random
import shlex
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
import torch
from openai.types import Completion

from .conftest import Served

EXAMPLES = Path(__file__).parents[2] / "examples"
FIRST_TEXT_TOKEN = 6  # the ids before it are special tokens


def complete(served: Served, prompt: list[int], max_tokens: int) -> Completion:
    """Greedy, with the ids of the answer's tokens for names and their log-probabilities."""
    return served.client.completions.create(
        model=served.name,
        prompt=prompt,
        max_tokens=max_tokens,
        temperature=0,
        logprobs=3,
        extra_body={"ignore_eos": True, "return_tokens_as_token_ids": True},
    )


def logprob_errors(served: Served, prompt: list[int], max_tokens: int, completion: Completion) -> torch.Tensor:
    """Checks that the answer has its length and is greedy; how far its logprobs are from Hugging Face's: [tokens]."""
    (choice,) = completion.choices
    assert completion.usage is not None and choice.logprobs is not None
    assert completion.usage.prompt_tokens == len(prompt)
    assert completion.usage.completion_tokens == max_tokens
    assert choice.logprobs.tokens and choice.logprobs.token_logprobs and choice.logprobs.top_logprobs
    answer = [int(token.removeprefix("token_id:")) for token in choice.logprobs.tokens]
    found = torch.tensor(choice.logprobs.token_logprobs)
    best = torch.tensor([max(top.values()) for top in choice.logprobs.top_logprobs])
    assert torch.equal(found, best)
    return (found - served.expected_logprobs(prompt, answer)).abs()


def prompt_of(length: int, seed: int = 0) -> list[int]:
    return random.Random(f"{length} {seed}").choices(range(FIRST_TEXT_TOKEN, 500), k=length)


def test_the_log_and_the_announcement_name_our_backend(served: Served) -> None:
    logged, announced = [line for line in served.log if "serves MLA decode" in line]
    assert announced.startswith("flashmla_backend 0.1.0 serves MLA decode: CPU reference path, 64-token pages, ")
    assert announced in logged


def test_the_printed_curl_line_works_as_it_is(served: Served) -> None:
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    (line,) = [line for line in served.log if line.startswith("curl ")]
    answer = subprocess.run(shlex.split(line), capture_output=True, text=True, timeout=120, check=True).stdout
    assert '"role":"assistant"' in answer and f'"model":"{served.name}"' in answer


def test_a_chat_completion_streams(served: Served) -> None:
    chunks = list(
        served.client.chat.completions.create(
            model=served.name,
            messages=[{"role": "system", "content": "Be brief."}, {"role": "user", "content": "How are you?"}],
            max_tokens=40,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
            extra_body={"ignore_eos": True},
        )
    )
    *content, usage_chunk = chunks
    texts = [chunk.choices[0].delta.content for chunk in content if chunk.choices[0].delta.content]
    assert len(texts) > 10, "the answer came in one piece"
    assert content[-1].choices[0].finish_reason == "length"
    assert usage_chunk.usage is not None and usage_chunk.usage.completion_tokens == 40


def test_a_chat_ends_where_the_model_ends_its_turn(served: Served) -> None:
    answer = served.client.chat.completions.create(
        model=served.name,
        messages=[{"role": "user", "content": "Say no more."}],
        max_tokens=40,
        extra_body={"allowed_token_ids": [1]},  # nothing but the end of the turn
    )
    assert answer.choices[0].finish_reason == "stop"
    assert answer.choices[0].message.content == ""


@pytest.mark.parametrize("length", [1, 63, 64, 65, 200])
def test_logprobs_are_those_of_hugging_face(served: Served, length: int) -> None:
    prompt = prompt_of(length)
    errors = logprob_errors(served, prompt, 40, complete(served, prompt, 40))
    assert errors.mean() < served.logprob_bound


def test_32_concurrent_requests_of_mixed_lengths(served: Served) -> None:
    lengths = random.Random(0)
    requests = [(prompt_of(lengths.randint(1, 400), seed), lengths.randint(2, 48)) for seed in range(32)]
    with ThreadPoolExecutor(32) as clients:
        answers = list(clients.map(lambda request: complete(served, *request), requests))
    errors = [logprob_errors(served, *request, answer) for request, answer in zip(requests, answers, strict=True)]
    assert torch.cat(errors).mean() < served.logprob_bound


def test_a_cancelled_request_stops_and_the_server_answers_again(served: Served) -> None:
    wanted = 7000
    before = served.metric("vllm:generation_tokens_total")
    body = {
        "model": served.name,
        "messages": [{"role": "user", "content": "Tell me all."}],
        "max_tokens": wanted,
        "stream": True,
        "ignore_eos": True,
    }
    with httpx.stream("POST", f"{served.url}/v1/chat/completions", json=body, timeout=120) as response:
        events = (line for line in response.iter_lines() if line.startswith("data: "))
        for _ in range(5):
            next(events)
        assert served.metric("vllm:num_requests_running") == 1
    deadline = time.monotonic() + 30
    while served.metric("vllm:num_requests_running"):
        assert time.monotonic() < deadline, "still running 30 s after the client went away"
        time.sleep(0.2)
    assert 0 < served.metric("vllm:generation_tokens_total") - before < wanted

    prompt = prompt_of(70)
    errors = logprob_errors(served, prompt, 20, complete(served, prompt, 20))
    assert errors.mean() < served.logprob_bound
    assert served.process.poll() is None


def test_the_streaming_example_runs(served: Served) -> None:
    command = [sys.executable, str(EXAMPLES / "stream_chat.py"), "--url", served.url, "--max-tokens", "16"]
    assert subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout.strip()
