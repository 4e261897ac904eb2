"""What flashmla cannot serve is refused when SGLang makes the backend, by name and with the way out."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang.srt.layers.dcp import comm as dcp_comm

from flashmla_backend.errors import Unsupported
from flashmla_backend.integration.sglang import compat, draft, refusals
from flashmla_backend.integration.sglang.dcp import WHOLE, Share


def runner(**changes: Any) -> Any:
    """The parts of a model runner that decide; `model_config_...` changes its configuration."""
    config = {
        "kv_lora_rank": 512,
        "qk_rope_head_dim": 64,
        "hf_config": SimpleNamespace(architectures=["DeepseekV2ForCausalLM"]),
    }
    made = {
        "use_mla_backend": True,
        "page_size": 64,
        "dtype": torch.bfloat16,
        "kv_cache_dtype": torch.bfloat16,
        "server_args": SimpleNamespace(enable_unified_memory=False),
        "model": SimpleNamespace(**{compat.GATHERS_FOR_DCP: None}),
    }
    for name, value in changes.items():
        of_config = name.startswith("config_")
        (config if of_config else made)[name.removeprefix("config_")] = value
    return SimpleNamespace(**made, model_config=SimpleNamespace(**config))


@pytest.fixture(autouse=True)
def no_speculation(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    asked = SimpleNamespace(speculative_algorithm=None, speculative_eagle_topk=None)
    monkeypatch.setattr(compat, "speculation", lambda model_runner: asked)
    monkeypatch.setattr(compat, "dcp_share", lambda: WHOLE)
    monkeypatch.setattr(compat, "scales_queries", lambda model_runner: False)
    return asked


@pytest.mark.parametrize("page_size", [16, 32, 64, 96, 128, 256])
def test_what_is_served(page_size: int) -> None:
    refusals.check_runner(runner(page_size=page_size))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"use_mla_backend": False, "config_hf_config": SimpleNamespace(architectures=["LlamaForCausalLM"])},
            ["LlamaForCausalLM", "multi-head latent attention", "drop --attention-backend flashmla"],
        ),
        ({"config_kv_lora_rank": 256}, ["kv_lora_rank 256", "takes 512 and 64", "drop --attention-backend flashmla"]),
        ({"config_qk_rope_head_dim": 32}, ["qk_rope_head_dim 32", "takes 512 and 64"]),
        ({"page_size": 1}, ["page_size is 1;", "multiples of 16", "--page-size 64"]),
        ({"page_size": 8}, ["page_size is 8;", "--page-size 64"]),
        ({"page_size": 72}, ["page_size is 72;", "multiples of 16", "--page-size 64"]),
        ({"kv_cache_dtype": torch.float8_e4m3fn}, ["float8_e4m3fn", "no FP8 yet", "--kv-cache-dtype auto"]),
        ({"kv_cache_dtype": torch.float16}, ["cache is float16, the model bfloat16", "--kv-cache-dtype auto"]),
        ({"server_args": SimpleNamespace(enable_unified_memory=True)}, ["--enable-unified-memory", "drop one"]),
    ],
    ids=str,
)
def test_models_and_caches(changes: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(Unsupported) as refusal:
        refusals.check_runner(runner(**changes))
    assert [word for word in words if word not in str(refusal.value)] == []


@pytest.fixture
def two_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compat, "dcp_share", lambda: Share(1, 2))


def test_a_cache_may_be_shared_out(two_ranks: None) -> None:
    refusals.check_runner(runner())


@pytest.mark.parametrize("option", ["mixed_chunk", "deterministic_inference"])
def test_prompts_over_a_shared_cache(option: str, two_ranks: None) -> None:
    options = SimpleNamespace(**{f"enable_{option}": True})
    with pytest.raises(Unsupported, match=f"dcp_size is 2, .*--dcp-size 1 or drop --enable-{option.replace('_', '-')}"):
        refusals.check_runner(runner(server_args=options))


def test_models_whose_cached_tokens_are_not_gathered(two_ranks: None) -> None:
    with pytest.raises(Unsupported, match=r"dcp_size is 2, and SGLang gathers no .* of Linear; pass --dcp-size 1"):
        refusals.check_runner(runner(model=torch.nn.Linear(1, 1)))


def test_verification_over_a_shared_cache(two_ranks: None, no_speculation: SimpleNamespace) -> None:
    no_speculation.speculative_algorithm = "EAGLE"
    with pytest.raises(Unsupported, match=r"dcp_size is 2, .*deals the tokens.*drop --speculative-algorithm"):
        refusals.check_runner(runner())


def test_scaled_queries_over_a_shared_cache(two_ranks: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compat, "scales_queries", lambda model_runner: True)
    with pytest.raises(Unsupported, match=r"dcp_size is 2, and SGLang takes no LSE .*--dcp-size 1"):
        refusals.check_runner(runner())


def test_releases_that_merge_by_another_lse(two_ranks: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """As 0.5.16 does."""
    monkeypatch.setattr(dcp_comm, "cp_lse_ag_out_rs_mla", lambda cp_attn_out, cp_attn_lse, cp_group, ctx=None: None)
    with pytest.raises(Unsupported, match=r"natural LSE, as 0\.5\.17 and newer do: .*takes no is_lse_base_on_e"):
        refusals.check_runner(runner())


def test_trees_of_drafts(no_speculation: SimpleNamespace) -> None:
    no_speculation.speculative_eagle_topk = 1
    refusals.check_runner(runner())
    no_speculation.speculative_eagle_topk = 4
    with pytest.raises(Unsupported, match=r"speculative_eagle_topk is 4.*--speculative-eagle-topk 1"):
        refusals.check_runner(runner())
    with pytest.raises(Unsupported, match=r"speculative_eagle_topk is 4"):
        draft.FlashMLAMultiStepDraftBackend(runner(), topk=4, speculative_num_steps=3)


def test_n_gram_speculation(no_speculation: SimpleNamespace) -> None:
    no_speculation.speculative_algorithm = "NGRAM"
    with pytest.raises(Unsupported, match="n-gram speculation verifies trees"):
        refusals.check_runner(runner())
