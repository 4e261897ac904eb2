"""`flashmla serve` as a user starts it, once per model, and the Hugging Face model to judge its answers by."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from openai import OpenAI

from flashmla_backend.checkpoint import default_checkpoint, make_checkpoint
from flashmla_backend.doctor import vllm_distribution

FLASHMLA = Path(sys.executable).with_name("flashmla")
START_SECONDS = 300


@dataclass
class Served:
    """A running `flashmla serve`."""

    checkpoint: Path
    name: str
    url: str
    process: subprocess.Popen[str]
    logprob_bound: float  # how far logprobs may be from Hugging Face's fp32 ones, in the mean
    log: list[str] = field(default_factory=list)

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
    port = _free_port()
    if request.param == "embedded default":
        # Hugging Face's own bf16 is off by up to 0.07: rounding decides which experts a token near a tie is sent to.
        checkpoint, name, logprob_bound = default_checkpoint(cache), "flashmla-default", 0.15
        arguments = ["serve", "--port", str(port)]
    else:
        checkpoint, name, logprob_bound = make_checkpoint(cache / "v3-moe", "v3-moe"), "v3", 1e-4
        arguments = ["serve", str(checkpoint), "--name", name, "--port", str(port)]
        arguments += ["--", "--dtype", "float32", "--max-model-len", "8192", "--block-size", "128"]

    environment = {**os.environ, "FLASHMLA_BACKEND_CACHE": str(cache), "VLLM_CPU_KVCACHE_SPACE": "1"}
    process = subprocess.Popen(
        [str(FLASHMLA), *arguments], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    server = Served(checkpoint, name, f"http://127.0.0.1:{port}", process, logprob_bound)
    threading.Thread(target=lambda: server.log.extend(process.stdout or []), daemon=True).start()
    try:
        deadline = time.monotonic() + START_SECONDS
        while not any(f"answers at {server.url}" in line for line in server.log):
            assert process.poll() is None, f"the server ended:\n{''.join(server.log[-40:])}"
            assert time.monotonic() < deadline, f"not up after {START_SECONDS} s:\n{''.join(server.log[-40:])}"
            time.sleep(0.2)
        yield server
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=60) == 0, "".join(server.log[-40:])
    finally:
        if process.poll() is None:  # the second signal ends all of the server's processes
            process.send_signal(signal.SIGINT)
            process.send_signal(signal.SIGTERM)
            process.wait(timeout=30)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
