"""Greedy tokens of the real engine on our backend equal those of Hugging Face transformers, one for one, in fp32."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import combinations, product
from pathlib import Path
from typing import Any

import pytest

from flashmla_backend.checkpoint import Architecture
from tests.greedy import SHARED, Reference

from .conftest import EngineRun

OURS = "flashmla_backend.integration.vllm.impl.FlashMLAImpl"
LAYERS = 4
BUDGET = 90  # tokens a step with chunked prefill: no multiple of a page, so chunks end anywhere in one
MAX_LENGTH = 512
DRAFTS = 3  # tokens guessed ahead a step
NGRAM = {
    "method": "ngram",
    "num_speculative_tokens": DRAFTS,
    "prompt_lookup_min": 1,
    "prompt_lookup_max": 3,
}


@dataclass(frozen=True)
class Case:
    architecture: Architecture
    block_size: int
    chunked: bool
    caching: bool
    drafts: bool
    compiled: bool
    many_processes: bool = False

    def __str__(self) -> str:
        on = [name for name in ("chunked", "caching", "drafts", "compiled", "many_processes") if getattr(self, name)]
        return "-".join([self.architecture, str(self.block_size), *on])


# Every pair of choices occurs in some case, which test_cases_cover_every_pair holds.
CASES = [
    Case("v2-dense", 64, chunked=False, caching=False, drafts=False, compiled=False),
    Case("v2-dense", 128, chunked=True, caching=True, drafts=True, compiled=False),
    Case("v2-dense", 256, chunked=True, caching=False, drafts=False, compiled=True),
    Case("v2-moe", 64, chunked=True, caching=True, drafts=True, compiled=True),
    Case("v2-moe", 128, chunked=False, caching=False, drafts=False, compiled=False),
    Case("v2-moe", 256, chunked=False, caching=True, drafts=True, compiled=False),
    Case("v3-moe", 64, chunked=True, caching=False, drafts=True, compiled=False),
    Case("v3-moe", 128, chunked=False, caching=True, drafts=False, compiled=True, many_processes=True),
    Case("v3-moe", 256, chunked=True, caching=False, drafts=False, compiled=False),
]


def test_cases_cover_every_pair() -> None:
    choices: dict[str, set[Any]] = {
        "architecture": {"v2-dense", "v2-moe", "v3-moe"},
        "block_size": {64, 128, 256},
        **{name: {False, True} for name in ("chunked", "caching", "drafts", "compiled")},
    }
    for (first, firsts), (second, seconds) in combinations(choices.items(), 2):
        seen = {(asdict(case)[first], asdict(case)[second]) for case in CASES}
        assert seen == set(product(firsts, seconds)), (first, second)


SMALL_PAGES = Case("v3-moe", 16, chunked=True, caching=True, drafts=True, compiled=False)


@pytest.mark.parametrize("case", [*CASES, SMALL_PAGES], ids=str)
def test_tokens_equal_transformers(
    case: Case,
    checkpoint: Callable[[Architecture], Path],
    reference: Callable[[Architecture], tuple[Reference, Reference]],
    run_engine: Callable[..., EngineRun],
) -> None:
    alone, sharing = reference(case.architecture)
    run = run_engine(
        [alone.prompts, sharing.prompts],
        many_processes=case.many_processes,
        model=str(checkpoint(case.architecture)),
        dtype="float32",
        attention_backend="flashmla",
        block_size=case.block_size,
        enable_chunked_prefill=case.chunked,
        max_num_batched_tokens=BUDGET if case.chunked else MAX_LENGTH,
        enable_prefix_caching=case.caching,
        enforce_eager=not case.compiled,
        max_model_len=MAX_LENGTH,
        max_num_seqs=16,
        kv_cache_memory_bytes=128 << 20,
        **({"speculative_config": NGRAM} if case.drafts else {}),
    )

    assert run.tokens == [alone.tokens, sharing.tokens]

    assert run.backend == OURS
    assert f"serves MLA decode: CPU reference path, {min(case.block_size, 64)}-token pages" in run.log
    assert run.config == {
        "block_size": case.block_size,
        "prefix_caching": case.caching,
        "chunked_prefill": case.chunked,
        "batched_tokens": BUDGET if case.chunked else MAX_LENGTH,
        "compilation": "DYNAMO_TRACE_ONCE" if case.compiled else "NONE",
    }
    in_cache = SHARED // case.block_size * case.block_size if case.caching else 0
    assert run.cached == [[0] * len(alone.prompts), [in_cache] * len(sharing.prompts)]
    check_decodes(case, run)


def check_decodes(case: Case, run: EngineRun) -> None:
    """The backend ran in every layer, on whole batches, and on drafts where there are any."""
    assert run.decoding_layers == LAYERS
    assert all(calls % LAYERS == 0 for calls in run.decodes.values())
    assert max(requests for requests, _ in run.decodes) > 1
    longest_query = max(new for _, new in run.decodes)
    assert any(new == 0 for _, new in run.decodes)  # short prompts, beside others and decodes
    if case.drafts:
        assert run.counters["vllm:spec_decode_num_accepted_tokens"] > 0
        assert longest_query == 1 + DRAFTS
    else:
        assert longest_query == 1


def settings(checkpoint: Path, **more: Any) -> dict[str, Any]:
    return {
        "model": str(checkpoint),
        "dtype": "float32",
        "attention_backend": "flashmla",
        "enforce_eager": True,
        "max_model_len": MAX_LENGTH,
        "max_num_seqs": 16,
        "kv_cache_memory_bytes": 128 << 20,
    } | more


def test_preempted_requests_resume(
    checkpoint: Callable[[Architecture], Path],
    reference: Callable[[Architecture], tuple[Reference, Reference]],
    run_engine: Callable[..., EngineRun],
) -> None:
    """A cache of 18 pages for requests that need 50, with everything on that moves lengths about."""
    alone, sharing = reference("v2-moe")
    page_bytes = 64 * 576 * 4 * LAYERS
    run = run_engine(
        [alone.prompts + sharing.prompts],
        **settings(
            checkpoint("v2-moe"),
            kv_cache_memory_bytes=18 * page_bytes,
            max_num_batched_tokens=BUDGET,
            speculative_config=NGRAM,
        ),
    )
    assert run.tokens == [alone.tokens + sharing.tokens]
    assert run.counters["vllm:num_preemptions"] > 0
    assert run.counters["vllm:spec_decode_num_accepted_tokens"] > 0


def test_multi_token_prediction(
    checkpoint: Callable[[Architecture], Path],
    reference: Callable[[Architecture], tuple[Reference, Reference]],
    run_engine: Callable[..., EngineRun],
) -> None:
    """A model that drafts for itself: its drafting layer runs on our backend too, over its own cache."""
    alone, sharing = reference("v3-moe")  # the same weights but for the drafting layer
    run = run_engine(
        [alone.prompts, sharing.prompts],
        **settings(
            checkpoint("v3-mtp"),
            speculative_config={"method": "mtp", "num_speculative_tokens": DRAFTS, "attention_backend": "flashmla"},
        ),
    )
    assert run.tokens == [alone.tokens, sharing.tokens]
    assert run.counters["vllm:spec_decode_num_draft_tokens"] > 0
    assert max(new for _, new in run.decodes) == 1 + DRAFTS
    assert run.decoding_layers == LAYERS + 1  # the drafting one too
