"""Small DeepSeek checkpoints made on the spot: real files, random weights, the same bytes on every machine.

They let the whole serving path run, and be compared token for token, without a download. The layer shapes that
attention sees (kv_lora_rank 512, rope 64, nope 128, value 128) are those of DeepSeek-V2 and -V3.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from . import tokenizer
from .errors import InvalidArgument

if TYPE_CHECKING:
    import torch

Architecture = Literal["v2-moe", "v2-dense", "v3-moe", "v3-mtp"]
Dtype = Literal["float32", "bfloat16"]
Progress = Callable[[int, int], None]
"""Called with (weights made so far, weights in all)."""

RECIPE = 1
"""Raise it whenever the bytes of a checkpoint change, so that no stale one is taken from the cache."""

# Standard deviation of a projection's output for an input of RMS 1. Queries and keys above 1 make attention
# peaked, so that a wrong attention shows in the tokens; the rest keeps the residual stream level.
GAINS = {
    "q_proj": 2.0,
    "q_b_proj": 2.0,
    "kv_a_proj_with_mqa": 1.3,
    "kv_b_proj": 1.3,
    "o_proj": 1.5,
    "gate": 2.0,
    "lm_head": 4.0,
}
UNREADABLE_GAIN = 0.25
"""Share of lm_head's gain for parts of words and bytes, so that the model, random as it is, talks in words."""


def make_checkpoint(
    path: str | os.PathLike[str],
    architecture: Architecture,
    *,
    dtype: Dtype = "float32",
    seed: int = 0,
    changes: dict[str, Any] | None = None,
    progress: Progress | None = None,
) -> Path:
    """Writes a checkpoint that Hugging Face transformers, vLLM and SGLang load; a few tens of MB.

    path: folder to make; may exist if it is empty. It appears at once, complete.
    architecture: "v2-moe" and "v2-dense" (DeepseekV2ForCausalLM), "v3-moe" (DeepseekV3ForCausalLM, yarn rope), and
        "v3-mtp", the same weights and a layer more for multi-token prediction.
    changes: values of config.json that differ from `model_config`'s, for models of other sizes.
    Equal (architecture, dtype, seed, changes) give equal bytes. Returns the folder.
    Raises InvalidArgument for an unknown architecture or dtype, a negative seed or a folder that is not empty.
    """
    _one_of("architecture", architecture, get_args(Architecture))
    _one_of("dtype", dtype, get_args(Dtype))
    if seed < 0:
        raise InvalidArgument(f"seed is {seed}; it must not be negative")
    target = Path(path)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise InvalidArgument(f"path is {target}, which is not an empty folder; name a new one")

    target.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        _write(staging, model_config(architecture, dtype) | (changes or {}), seed, progress)
        staging.chmod(0o755)  # mkdtemp's 0700 would keep other users of a shared cache out
        staging.replace(target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return target


def default_checkpoint(cache_dir: str | os.PathLike[str] | None = None, *, progress: Progress | None = None) -> Path:
    """The embedded default (v2-moe, bfloat16), made on first use and then taken from the cache.

    cache_dir: default $FLASHMLA_BACKEND_CACHE, else flashmla_backend in $XDG_CACHE_HOME or ~/.cache.
    """
    folder = (Path(cache_dir) if cache_dir is not None else cache_folder()) / f"v2-moe-bfloat16-r{RECIPE}"
    if folder.is_dir():
        return folder
    try:
        return make_checkpoint(folder, "v2-moe", dtype="bfloat16", progress=progress)
    except (InvalidArgument, OSError):
        if folder.is_dir():  # another process made it in the meantime, with the same bytes
            return folder
        raise


def cache_folder() -> Path:
    """Where the embedded checkpoint is kept."""
    if chosen := os.environ.get("FLASHMLA_BACKEND_CACHE"):
        return Path(chosen)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "flashmla_backend"


def model_config(architecture: Architecture, dtype: Dtype) -> dict[str, Any]:
    """The config.json of a checkpoint."""
    tokens, _ = tokenizer.vocabulary()
    layers = 4
    config: dict[str, Any] = {
        "architectures": ["DeepseekV2ForCausalLM"],
        "model_type": "deepseek_v2",
        "dtype": dtype,
        "vocab_size": len(tokens),
        "bos_token_id": tokenizer.BOS_ID,
        "eos_token_id": tokenizer.EOS_ID,
        "pad_token_id": tokenizer.PAD_ID,
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": layers,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "q_lora_rank": None,
        "kv_lora_rank": 512,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "max_position_embeddings": 16384,
        "rope_theta": 10000.0,
        "rope_scaling": None,
        "rms_norm_eps": 1e-6,
        "hidden_act": "silu",
        "attention_bias": False,
        "tie_word_embeddings": False,
        "first_k_dense_replace": 1,
        "moe_layer_freq": 1,
        "moe_intermediate_size": 128,
        "n_routed_experts": 8,
        "n_shared_experts": 2,
        "num_experts_per_tok": 2,
        "norm_topk_prob": False,
        "routed_scaling_factor": 1.0,
        "scoring_func": "softmax",
        "topk_method": "greedy",
        "n_group": 1,
        "topk_group": 1,
    }
    if architecture == "v2-dense":
        config["first_k_dense_replace"] = layers  # transformers wants n_routed_experts even so
    if architecture in ("v3-moe", "v3-mtp"):
        config |= {
            "architectures": ["DeepseekV3ForCausalLM"],
            "model_type": "deepseek_v3",
            "q_lora_rank": 192,
            "n_shared_experts": 1,
            "num_experts_per_tok": 3,
            "norm_topk_prob": True,
            "routed_scaling_factor": 2.5,
            "scoring_func": "sigmoid",
            "topk_method": "noaux_tc",
            "n_group": 4,
            "topk_group": 2,
            "num_nextn_predict_layers": int(architecture == "v3-mtp"),
            "rope_scaling": {
                "type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 4096,
                "beta_fast": 32,
                "beta_slow": 1,
                "mscale": 1.0,
                "mscale_all_dim": 1.0,
            },
        }
    return config


def _weight_shapes(config: dict[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes ([out, in] for projections) under the names of DeepSeek's own checkpoints."""
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    q_rank, kv_rank = config["q_lora_rank"], config["kv_lora_rank"]
    nope, rope, value = config["qk_nope_head_dim"], config["qk_rope_head_dim"], config["v_head_dim"]

    def mlp(prefix: str, inner: int) -> Iterator[tuple[str, tuple[int, ...]]]:
        yield f"{prefix}.gate_proj.weight", (inner, hidden)
        yield f"{prefix}.up_proj.weight", (inner, hidden)
        yield f"{prefix}.down_proj.weight", (hidden, inner)

    yield "model.embed_tokens.weight", (config["vocab_size"], hidden)
    drafting = config.get("num_nextn_predict_layers", 0)
    for layer in range(config["num_hidden_layers"] + drafting):
        prefix = f"model.layers.{layer}"
        yield f"{prefix}.input_layernorm.weight", (hidden,)
        yield f"{prefix}.post_attention_layernorm.weight", (hidden,)

        attention = f"{prefix}.self_attn"
        if q_rank is None:
            yield f"{attention}.q_proj.weight", (heads * (nope + rope), hidden)
        else:
            yield f"{attention}.q_a_proj.weight", (q_rank, hidden)
            yield f"{attention}.q_a_layernorm.weight", (q_rank,)
            yield f"{attention}.q_b_proj.weight", (heads * (nope + rope), q_rank)
        yield f"{attention}.kv_a_proj_with_mqa.weight", (kv_rank + rope, hidden)
        yield f"{attention}.kv_a_layernorm.weight", (kv_rank,)
        yield f"{attention}.kv_b_proj.weight", (heads * (nope + value), kv_rank)
        yield f"{attention}.o_proj.weight", (hidden, heads * value)

        if layer < config["first_k_dense_replace"]:
            yield from mlp(f"{prefix}.mlp", config["intermediate_size"])
            continue
        experts, inner = config["n_routed_experts"], config["moe_intermediate_size"]
        yield f"{prefix}.mlp.gate.weight", (experts, hidden)
        if config["topk_method"] == "noaux_tc":
            yield f"{prefix}.mlp.gate.e_score_correction_bias", (experts,)
        for expert in range(experts):
            yield from mlp(f"{prefix}.mlp.experts.{expert}", inner)
        yield from mlp(f"{prefix}.mlp.shared_experts", inner * config["n_shared_experts"])
    for layer in range(config["num_hidden_layers"], config["num_hidden_layers"] + drafting):
        prefix = f"model.layers.{layer}"
        yield f"{prefix}.enorm.weight", (hidden,)
        yield f"{prefix}.hnorm.weight", (hidden,)
        yield f"{prefix}.eh_proj.weight", (hidden, 2 * hidden)
        yield f"{prefix}.shared_head.norm.weight", (hidden,)
        yield f"{prefix}.embed_tokens.weight", (config["vocab_size"], hidden)
        yield f"{prefix}.shared_head.head.weight", (config["vocab_size"], hidden)
    yield "model.norm.weight", (hidden,)
    yield "lm_head.weight", (config["vocab_size"], hidden)


def _weight(name: str, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """One fp32 tensor, drawn from a stream of its own so that it depends on nothing but its name and the seed."""
    import torch

    if name.endswith("norm.weight"):
        return torch.ones(shape)
    # A layer that drafts has the main model's embedding and head once more, as in DeepSeek's checkpoints.
    name = re.sub(r"^model\.layers\.\d+\.(embed_tokens)", r"model.\1", name)
    name = re.sub(r"^model\.layers\.\d+\.shared_head\.head", "lm_head", name)
    generator = torch.Generator().manual_seed(
        int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:8], "little") >> 1
    )
    # Uniform, not normal: it is exact arithmetic on the generator's bits, the same on every CPU.
    weight = torch.rand(shape, generator=generator) * 2 - 1
    if name.endswith("e_score_correction_bias"):
        return weight * 0.1
    unit = math.sqrt(3)  # a uniform on [-1, 1] has standard deviation 1/sqrt(3)
    if name == "model.embed_tokens.weight":
        return weight * unit
    weight *= GAINS.get(name.split(".")[-2], 1.0) * unit / math.sqrt(shape[-1])
    if name == "lm_head.weight":
        weight *= torch.tensor([1.0 if readable else UNREADABLE_GAIN for readable in tokenizer.readable_tokens()])[
            :, None
        ]
    return weight


def _write(folder: Path, config: dict[str, Any], seed: int, progress: Progress | None) -> None:
    import torch
    from safetensors.torch import save_file

    dtype = getattr(torch, config["dtype"])
    shapes = dict(_weight_shapes(config))
    weights: dict[str, torch.Tensor] = {}
    made, total = 0, sum(torch.Size(shape).numel() for shape in shapes.values())
    for name, shape in shapes.items():
        weight = _weight(name, shape, seed)
        # DeepSeek keeps the routing bias in fp32 whatever the checkpoint's dtype.
        keep_fp32 = name.endswith("e_score_correction_bias")
        weights[name] = weight if keep_fp32 else weight.to(dtype)
        made += weight.numel()
        if progress is not None:
            progress(made, total)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})

    generation = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
    tokenizer.write_tokenizer(folder)


def _one_of(name: str, given: object, accepted: tuple[str, ...]) -> None:
    if given not in accepted:
        raise InvalidArgument(f"{name} is {given!r}; accepted: {', '.join(map(repr, accepted))}")
