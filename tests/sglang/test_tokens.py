"""Greedy tokens of the real engine on our backend equal Hugging Face's, token for token, in fp32."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from flashmla_backend.checkpoint import Architecture
from flashmla_backend.sglang_engine import IDLE_YARN
from tests.greedy import NEW_TOKENS, SHARED, Reference

from .conftest import EngineRun

MAX_LENGTH = 512
CHUNK = 128


@dataclass(frozen=True)
class Case:
    architecture: Architecture
    chunked: bool
    caching: bool
    ranks: int = 1  # that share the cache (DCP)

    def __str__(self) -> str:
        return f"{self.architecture} chunked={self.chunked} caching={self.caching} ranks={self.ranks}"


CASES = [
    Case("v2-moe", chunked=True, caching=True),
    Case("v3-moe", chunked=False, caching=False),
    Case("v2-moe", chunked=True, caching=True, ranks=2),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_tokens_equal_transformers(
    case: Case,
    checkpoint: Callable[[Architecture], Path],
    reference: Callable[[Architecture], tuple[Reference, Reference]],
    run_engine: Callable[..., EngineRun],
) -> None:
    alone, sharing = reference(case.architecture)
    new_tokens = NEW_TOKENS
    if case.ranks > 1:  # Triton's interpreter takes its time
        new_tokens = 6
        alone, sharing = shortened(alone, [1, 7, -1], new_tokens), shortened(sharing, [0, 1], new_tokens)
    plain_rope = not case.architecture.startswith("v3")
    run = run_engine(
        [alone.prompts, sharing.prompts],
        new_tokens=new_tokens,
        model_path=str(checkpoint(case.architecture)),
        device="cpu",
        dtype="float32",
        attention_backend="flashmla",
        json_model_override_args=json.dumps(IDLE_YARN if plain_rope else {}),
        chunked_prefill_size=CHUNK if case.chunked else -1,
        disable_radix_cache=not case.caching,
        tp_size=case.ranks,
        dcp_size=case.ranks,
        context_length=MAX_LENGTH,
        max_running_requests=16,
        max_total_tokens=16 * MAX_LENGTH // case.ranks,  # of one rank
        mem_fraction_static=0.3,  # SGLang's own choice supposes chunks
        skip_tokenizer_init=True,
        grammar_backend="none",
        log_level="info",
    )

    assert run.tokens == [alone.tokens, sharing.tokens]
    assert "serves MLA decode: CPU reference path, 64-token pages" in run.log
    if case.chunked:
        assert f"#new-token: {CHUNK}," in run.log
    page = 64 * case.ranks
    in_cache = SHARED // page * page if case.caching else 0
    assert run.cached[1] == [in_cache] * len(sharing.prompts)


def shortened(reference: Reference, which: list[int], new_tokens: int) -> Reference:
    """Some of its prompts, and the beginnings of their continuations."""
    return Reference([reference.prompts[i] for i in which], [reference.tokens[i][:new_tokens] for i in which])
