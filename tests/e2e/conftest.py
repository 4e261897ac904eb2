"""`flashmla serve` as a user starts it, once per model, and the Hugging Face model to judge its answers by."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from openai import OpenAI

from flashmla_backend.checkpoint import default_checkpoint, make_checkpoint
from flashmla_backend.doctor import vllm_distribution
from tests.serving import Server, serving


@dataclass
class Served(Server):
    checkpoint: Path
    name: str
    logprob_bound: float  # how far logprobs may be from Hugging Face's fp32 ones, in the mean

    @cached_property
    def client(self) -> OpenAI:
        return OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=120)

    @cached_property
    def reference(self) -> Any:
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_pretrained(self.checkpoint, dtype=torch.float32)

    def metric(self, name: str) -> float:
        """The sum of one of vLLM's Prometheus metrics."""
        text = httpx.get(f"{self.url}/metrics").text
        values = re.findall(rf"^{re.escape(name)}(?:{{.*}})? (\S+)$", text, flags=re.MULTILINE)
        assert values, f"no metric {name}"
        return sum(map(float, values))

    def expected_logprobs(self, prompt: list[int], answer: list[int]) -> torch.Tensor:
        """Hugging Face's log-probability of each token of `answer`, given what stands before it: [len(answer)]."""
        with torch.no_grad():
            logits = self.reference(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]  # [answer, V]
        return logits.log_softmax(-1).gather(1, torch.tensor(answer)[:, None])[:, 0]


@pytest.fixture(scope="session", params=["embedded default", "v3-moe"])
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    if vllm_distribution() is None:
        pytest.skip("vLLM is not installed")
    cache = tmp_path_factory.mktemp("cache")
    if request.param == "embedded default":
        # Hugging Face's own bf16 is off by up to 0.07: rounding decides which experts a token near a tie is sent to.
        checkpoint, name, logprob_bound, arguments = default_checkpoint(cache), "flashmla-default", 0.15, []
    else:
        checkpoint, name, logprob_bound = make_checkpoint(cache / "v3-moe", "v3-moe"), "v3", 1e-4
        arguments = [str(checkpoint), "--name", name]
        arguments += ["--", "--dtype", "float32", "--max-model-len", "8192", "--block-size", "128"]

    environment = {"FLASHMLA_BACKEND_CACHE": str(cache), "VLLM_CPU_KVCACHE_SPACE": "1"}
    # vLLM's engine core spins, and its thread that sends the tokens then gets the interpreter only if it is on the same
    # CPU: on two busy ones all tokens of an answer arrive at its end.
    with serving(arguments, environment, cpus={min(os.sched_getaffinity(0))}) as server:
        yield Served(**vars(server), checkpoint=checkpoint, name=name, logprob_bound=logprob_bound)
