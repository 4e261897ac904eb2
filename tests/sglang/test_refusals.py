"""What flashmla cannot serve is refused when SGLang makes the backend, by name and with the way out."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from flashmla_backend.errors import Unsupported
from flashmla_backend.integration.sglang import compat, draft, refusals


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
    }
    for name, value in changes.items():
        of_config = name.startswith("config_")
        (config if of_config else made)[name.removeprefix("config_")] = value
    return SimpleNamespace(**made, model_config=SimpleNamespace(**config))


@pytest.fixture(autouse=True)
def no_speculation(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    asked = SimpleNamespace(speculative_algorithm=None, speculative_eagle_topk=None)
    monkeypatch.setattr(compat, "speculation", lambda model_runner: asked)
    monkeypatch.setattr(compat, "dcp_size", lambda: 1)
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


def test_context_parallelism(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compat, "dcp_size", lambda: 2)
    with pytest.raises(Unsupported, match=r"dcp_size is 2; .*only its FlashInfer backend.*--dcp-size 1"):
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
