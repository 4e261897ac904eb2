"""The models whose steps are measured: configurations alone, their weights are drawn on the device."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flashmla_backend.checkpoint import model_config
from flashmla_backend.errors import InvalidArgument

if TYPE_CHECKING:
    import torch

LOAD_FORMAT = "flashmla_random"

# DeepSeek-V2-Lite as published.
V2_LITE = {
    "hidden_size": 2048,
    "intermediate_size": 10944,
    "moe_intermediate_size": 1408,
    "n_routed_experts": 64,
    "num_experts_per_tok": 6,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "num_hidden_layers": 27,
    "vocab_size": 102400,
}
# The attention of DeepSeek-V3, all 128 heads of it; hidden size, MLPs and query rank thin, so that attention dominates.
V3_ATTENTION = {
    "hidden_size": 1024,
    "intermediate_size": 512,
    "q_lora_rank": 512,
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "num_hidden_layers": 48,
    "first_k_dense_replace": 48,
    "vocab_size": 8192,
}
MODELS: dict[str, dict[str, Any]] = {"v2-lite": V2_LITE, "v3-attention": V3_ATTENTION, "tiny": {}}

# Factors on the standard deviation that keeps a projection's output at the level of its input. Queries and keys above
# 1 make attention peaked, so that it decides the logits.
GAINS = {"q_proj": 2.0, "q_b_proj": 2.0, "kv_b_proj": 1.3, "o_proj": 1.5, "gate": 2.0, "lm_head": 4.0}


def write_config(name: str, dtype: str, max_length: int, folder: Path) -> Path:
    """A folder with the config.json of a model. Raises InvalidArgument for a name that is not in MODELS."""
    if name not in MODELS:
        raise InvalidArgument(f"models has {name!r}; accepted: {', '.join(MODELS)}")
    config = model_config("v2-moe", "float32" if dtype == "float32" else "bfloat16") | MODELS[name]
    config["max_position_embeddings"] = max(config["max_position_embeddings"], max_length)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    return folder


def draw_weights(model: torch.nn.Module) -> None:
    """Random weights in place, the same for every backend."""
    import torch

    generators: dict[torch.device, torch.Generator] = {}
    for name, weight in model.named_parameters():
        if weight.device not in generators:
            generators[weight.device] = torch.Generator(weight.device).manual_seed(0)
        *_, module, kind = name.split(".")
        if kind != "weight" and weight.dim() < 2:
            weight.data.zero_()  # biases, of the routing too
        elif weight.dim() < 2:
            weight.data.fill_(1.0)  # norms
        else:
            inputs = 1 if module == "embed_tokens" else weight.shape[-1]
            weight.data.normal_(0.0, GAINS.get(module, 1.0) * inputs**-0.5, generator=generators[weight.device])


def register_loader() -> None:
    """Makes vLLM's `load_format=LOAD_FORMAT` draw weights."""
    from vllm.model_executor.model_loader import register_model_loader
    from vllm.model_executor.model_loader.dummy_loader import DummyModelLoader

    @register_model_loader(LOAD_FORMAT)
    class RandomWeights(DummyModelLoader):
        def load_weights(self, model: torch.nn.Module, model_config: Any) -> None:
            draw_weights(model)
