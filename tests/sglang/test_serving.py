"""`flashmla serve --engine sglang` as a user starts it: the embedded default over HTTP, answered by our backend."""

from __future__ import annotations

import json
import os
import random
import re
import shlex
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from transformers import AutoModelForCausalLM

from flashmla_backend.checkpoint import default_checkpoint
from tests.serving import FLASHMLA, Server, serving

FIRST_TEXT_TOKEN = 6  # the ids before it are special tokens
# Hugging Face's own bf16 is off by up to 0.07: rounding decides which experts a token near a tie is sent to.
LOGPROB_BOUND = 0.15


@dataclass
class Served(Server):
    checkpoint: Path


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    cache = tmp_path_factory.mktemp("cache")
    with serving(["--engine", "sglang"], {"FLASHMLA_BACKEND_CACHE": str(cache)}) as server:
        yield Served(**vars(server), checkpoint=default_checkpoint(cache))


def test_the_log_and_the_announcement_name_our_backend(served: Served) -> None:
    announced = [line for line in served.log if line.startswith("flashmla_backend") and "serves MLA decode" in line]
    assert announced == ["flashmla_backend 0.1.0 serves MLA decode: CPU reference path, 64-token pages\n"]


def test_the_printed_curl_line_works_as_it_is(served: Served) -> None:
    (line,) = [line for line in served.log if line.startswith("curl ")]
    answer = subprocess.run(shlex.split(line), capture_output=True, text=True, timeout=120, check=True).stdout
    assert json.loads(answer)["model"] == "flashmla-default"


def test_a_chat_completion_streams(served: Served) -> None:
    body = {
        "model": "flashmla-default",
        "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "How are you?"}],
        "max_tokens": 40,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
        "ignore_eos": True,
    }
    with httpx.stream("POST", f"{served.url}/v1/chat/completions", json=body, timeout=120) as response:
        events = [line.removeprefix("data: ") for line in response.iter_lines() if line.startswith("data: ")]
    assert events[-1] == "[DONE]"
    chunks = [json.loads(event) for event in events[:-1]]
    choices = [chunk["choices"][0] for chunk in chunks if chunk["choices"]]
    assert sum(bool(choice["delta"].get("content")) for choice in choices) > 10, "the answer came in one piece"
    assert choices[-1]["finish_reason"] == "length"
    (usage,) = [chunk["usage"] for chunk in chunks if chunk.get("usage") and not chunk["choices"]]
    assert usage["completion_tokens"] == 40


def test_32_concurrent_requests_of_mixed_lengths(served: Served) -> None:
    chosen = random.Random(0)
    requests = [
        (chosen.choices(range(FIRST_TEXT_TOKEN, 500), k=chosen.randint(1, 130)), chosen.randint(2, 12))
        for _ in range(32)
    ]
    with ThreadPoolExecutor(32) as clients:
        answers = list(clients.map(lambda request: generate(served, *request), requests))
    model = AutoModelForCausalLM.from_pretrained(served.checkpoint, dtype=torch.float32)
    errors = []
    for (prompt, new_tokens), answer in zip(requests, answers, strict=True):
        found = answer["meta_info"]["output_token_logprobs"]  # (logprob, id, text) of each token
        ids = [token[1] for token in found]
        assert len(ids) == new_tokens
        with torch.no_grad():
            logits = model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]
        expected = logits.log_softmax(-1).gather(1, torch.tensor(ids)[:, None])[:, 0]
        errors.append((torch.tensor([token[0] for token in found]) - expected).abs())
    assert torch.cat(errors).mean() < LOGPROB_BOUND


def generate(served: Served, prompt: list[int], new_tokens: int) -> dict[str, Any]:
    sampling = {"temperature": 0, "max_new_tokens": new_tokens, "ignore_eos": True}
    body = {"input_ids": prompt, "sampling_params": sampling, "return_logprob": True}
    response = httpx.post(f"{served.url}/generate", json=body, timeout=300)
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def test_doctor_finds_that_our_backend_serves() -> None:
    asked = subprocess.run([str(FLASHMLA), "doctor", "--json"], capture_output=True, text=True, timeout=120)
    report = json.loads(asked.stdout)
    assert asked.returncode == 0 and report["will_serve"], asked.stdout
    assert report["decode_path"] == "CPU reference path"
    found = {finding["subject"]: finding["found"] for finding in report["findings"]}
    assert re.fullmatch(r"0\.5\.\d+, supported", found["SGLang"])
    assert found["--attention-backend flashmla in SGLang"] == "flashmla_backend, CPU reference path"


def test_doctor_says_who_serves_instead() -> None:
    environment = {**os.environ, "COLUMNS": "200", "FLASHMLA_BACKEND_DISABLE": "1"}
    asked = subprocess.run([str(FLASHMLA), "doctor"], capture_output=True, text=True, timeout=120, env=environment)
    assert asked.returncode == 1 and "unset FLASHMLA_BACKEND_DISABLE" in asked.stdout
