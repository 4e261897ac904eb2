"""What flashmla cannot serve is refused when the engine is configured, by name and with the way out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.platforms import current_platform
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend
from vllm.v1.attention.selector import AttentionSelectorConfig

from flashmla_backend.checkpoint import Architecture
from flashmla_backend.errors import Unsupported
from flashmla_backend.integration.vllm import register

pytestmark = pytest.mark.usefixtures("unchanged_environment")

FLASHMLA = AttentionBackendEnum.FLASHMLA


@pytest.fixture(autouse=True)
def ours() -> None:
    FLASHMLA.clear_override()
    register()


@pytest.fixture
def configure(checkpoint: Callable[[Architecture], Path]) -> Callable[..., Any]:
    """The engine's configuration for the given arguments; no engine starts."""

    def create(**arguments: Any) -> Any:
        defaults: dict[str, Any] = {
            "model": str(checkpoint("v2-dense")),
            "dtype": "float32",
            "attention_backend": "flashmla",
            "max_model_len": 512,
        }
        return EngineArgs(**defaults | arguments).create_engine_config()

    return create


@pytest.mark.parametrize("block_size", [8, 48, 96, 192, 512])
def test_other_block_sizes(configure: Callable[..., Any], block_size: int) -> None:
    with pytest.raises(
        ValueError, match=f"block_size is {block_size}; --attention-backend flashmla takes 16, 32, 64, 128, 256"
    ):
        configure(block_size=block_size)


@pytest.mark.parametrize("block_size", [None, 16, 32, 64, 128, 256])
def test_block_sizes_kept(configure: Callable[..., Any], block_size: int | None) -> None:
    assert configure(block_size=block_size).cache_config.block_size == (block_size or 64)


@pytest.mark.parametrize("spelling", ["flashmla", "FLASHMLA", "FlashMLA"])
def test_any_spelling_of_the_flag_selects_us(configure: Callable[..., Any], spelling: str) -> None:
    assert configure(attention_backend=spelling).cache_config.block_size == 64


def test_selected_for_mla_layers_alone(configure: Callable[..., Any]) -> None:
    per_kind = {"backend_per_kind": {"mla_attention": "flashmla"}}
    assert configure(attention_backend=None, attention_config=per_kind).cache_config.block_size == 64


def test_vllms_defaults_for_prefill_and_prefixes_stand(configure: Callable[..., Any]) -> None:
    config = configure()
    assert config.scheduler_config.enable_chunked_prefill
    assert config.cache_config.enable_prefix_caching


def test_without_the_flag_stock_vllm_serves(configure: Callable[..., Any]) -> None:
    config = configure(attention_backend=None)
    assert config.cache_config.block_size != 64
    assert "-rotary_embedding" not in config.compilation_config.custom_ops


def test_the_rotary_op_that_corrupts_queries_is_off(configure: Callable[..., Any]) -> None:
    assert configure(enforce_eager=True).compilation_config.custom_ops.count("-rotary_embedding") == 1
    with pytest.raises(Unsupported, match=r"'\+rotary_embedding'.*leave it out"):
        configure(compilation_config={"custom_ops": ["+rotary_embedding"]})


def test_configuring_twice_changes_nothing(configure: Callable[..., Any]) -> None:
    config = configure(block_size=128, enable_prefix_caching=False, max_num_batched_tokens=600)
    before = (str(config.cache_config), str(config.scheduler_config), str(config.compilation_config))
    current_platform.check_and_update_config(config)
    assert before == (str(config.cache_config), str(config.scheduler_config), str(config.compilation_config))


def test_drafting_model_on_another_backend(
    configure: Callable[..., Any], checkpoint: Callable[[Architecture], Path]
) -> None:
    drafts = {"method": "mtp", "num_speculative_tokens": 2}
    with pytest.raises(Unsupported, match=r"method 'mtp'.*add \"attention_backend\": \"flashmla\""):
        configure(model=str(checkpoint("v3-mtp")), speculative_config=drafts)
    configure(model=str(checkpoint("v3-mtp")), speculative_config=drafts | {"attention_backend": "flashmla"})


def test_model_without_mla(configure: Callable[..., Any], tmp_path: Path) -> None:
    plain = LlamaConfig(hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
    plain.architectures = ["LlamaForCausalLM"]
    plain.save_pretrained(tmp_path)
    with pytest.raises(Unsupported) as refusal:
        configure(model=str(tmp_path), skip_tokenizer_init=True)
    for part in ("LlamaForCausalLM", "multi-head latent attention", "drop --attention-backend flashmla"):
        assert part in str(refusal.value)


def test_mla_switched_off(configure: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_MLA_DISABLE", "1")
    with pytest.raises(Unsupported, match=r"DeepseekV2ForCausalLM.*runs without it"):
        configure()


def test_claimed_by_a_later_plugin(configure: Callable[..., Any], log: pytest.LogCaptureFixture) -> None:
    register_backend(FLASHMLA, "other.package.TheirBackend")
    assert configure().cache_config.block_size != 64
    assert "FLASHMLA belongs to other.package.TheirBackend" in log.text


def test_float32_is_for_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    assert FLASHMLA.get_class().supports_combination(576, torch.float32, "auto") is None
    monkeypatch.setattr(current_platform, "is_cpu", lambda: False)
    assert "float32 is served on the CPU only" in FLASHMLA.get_class().supports_combination(576, torch.float32, "auto")
    assert FLASHMLA.get_class().supports_combination(576, torch.bfloat16, "auto") is None


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"head_size": 320}, "head_size not supported"),
        ({"dtype": torch.float64}, "dtype not supported"),
        ({"kv_cache_dtype": "fp8"}, "kv_cache_dtype not supported"),
        ({"kv_cache_dtype": "float16"}, "a torch.float16 cache for a torch.bfloat16 model is not supported"),
        ({"use_sparse": True}, "sparse not supported"),
        ({"use_mla": False}, "non-MLA not supported"),
    ],
    ids=str,
)
def test_attention_we_cannot_serve(change: dict[str, Any], reason: str) -> None:
    served = AttentionSelectorConfig(
        head_size=576, dtype=torch.bfloat16, kv_cache_dtype="auto", block_size=64, use_mla=True
    )
    assert current_platform.get_attn_backend_cls(FLASHMLA, served) == FLASHMLA.get_path()
    with pytest.raises(Unsupported) as refusal:
        current_platform.get_attn_backend_cls(FLASHMLA, served._replace(**change))
    assert reason in str(refusal.value)
    assert "drop --attention-backend flashmla" in str(refusal.value)
