"""The checkpoints made on the spot: the same bytes each time, and files that Hugging Face loads whole."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import get_args

import pytest
import torch
from safetensors.torch import load_file

from flashmla_backend import checkpoint, tokenizer
from flashmla_backend.checkpoint import Architecture, default_checkpoint, make_checkpoint
from flashmla_backend.errors import InvalidArgument

ARCHITECTURES = get_args(Architecture)

# Of the embedded default's weights and texts. If it changes, raise checkpoint.RECIPE: caches hold the old one.
DEFAULT_DIGEST = "9924d588dce61f7f4dff94d398c078b86599e26ffad39a6e60073d7ebf4fa422"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("checkpoints")
    return {architecture: make_checkpoint(folder / architecture, architecture) for architecture in ARCHITECTURES}


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_equal_arguments_give_equal_bytes(made: dict[str, Path], architecture: Architecture, tmp_path: Path) -> None:
    torch.manual_seed(99)  # nothing may depend on the global generator
    assert files(make_checkpoint(tmp_path / "again", architecture)) == files(made[architecture])


def test_another_seed_gives_other_weights_and_the_same_config(made: dict[str, Path], tmp_path: Path) -> None:
    first, other = files(made["v2-moe"]), files(make_checkpoint(tmp_path / "other", "v2-moe", seed=1))
    assert {name for name in first if first[name] != other[name]} == {"model.safetensors"}


def test_bfloat16_is_the_rounded_float32(made: dict[str, Path], tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "bf16", "v3-moe", dtype="bfloat16")
    single, half = load_file(made["v3-moe"] / "model.safetensors"), load_file(folder / "model.safetensors")
    assert single.keys() == half.keys()
    for name, weight in single.items():
        expected = weight if name.endswith("e_score_correction_bias") else weight.bfloat16()
        assert half[name].dtype == expected.dtype and torch.equal(half[name], expected), name


def test_the_layer_that_drafts_shares_embedding_and_head(made: dict[str, Path]) -> None:
    plain, drafting = (load_file(made[name] / "model.safetensors") for name in ("v3-moe", "v3-mtp"))
    assert all(torch.equal(drafting[name], weight) for name, weight in plain.items())
    own = "model.layers.4."
    assert {name for name in drafting if name not in plain} == {name for name in drafting if name.startswith(own)}
    assert torch.equal(drafting[own + "embed_tokens.weight"], plain["model.embed_tokens.weight"])
    assert torch.equal(drafting[own + "shared_head.head.weight"], plain["lm_head.weight"])


def test_the_embedded_default_is_the_same_on_every_machine(tmp_path: Path) -> None:
    folder = default_checkpoint(tmp_path)
    digest = hashlib.sha256()
    for name, weight in sorted(load_file(folder / "model.safetensors").items()):
        digest.update(f"{name} {weight.dtype} {list(weight.shape)}".encode())
        digest.update(weight.view(torch.uint8).numpy().tobytes())
    digest.update((folder / "config.json").read_bytes())
    digest.update(json.dumps(tokenizer.vocabulary()).encode())
    assert digest.hexdigest() == DEFAULT_DIGEST


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_hugging_face_loads_every_weight_and_no_other(made: dict[str, Path], architecture: Architecture) -> None:
    from transformers import AutoModelForCausalLM

    model, loading = AutoModelForCausalLM.from_pretrained(
        made[architecture], dtype=torch.float32, output_loading_info=True
    )
    unexpected = loading.pop("unexpected_keys")
    assert bool(unexpected) == (architecture == "v3-mtp")
    assert all(name.startswith("model.layers.4.") for name in unexpected)  # transformers does not draft
    assert not any(loading.values()), loading
    config = model.config
    assert (config.kv_lora_rank, config.qk_rope_head_dim, config.qk_nope_head_dim, config.v_head_dim) == (
        512,
        64,
        128,
        128,
    )
    tokens = model.generate(torch.tensor([[10, 11, 12]]), max_new_tokens=8, min_new_tokens=8, do_sample=False)
    assert tokens.shape == (1, 11)


def test_the_tokenizer_keeps_text_and_closes_turns(made: dict[str, Path]) -> None:
    from transformers import AutoTokenizer

    loaded = AutoTokenizer.from_pretrained(made["v2-moe"])
    text = "Hello there, what is the time?\n  Zürich, 東京, \U0001f642 \x00 done."
    assert loaded.decode(loaded.encode(text)) == text
    assert len(loaded.encode(" the people")) == 2
    messages = [{"role": "system", "content": "A"}, {"role": "user", "content": "B"}]
    prompt = loaded.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert prompt == "<|begin|><|system|>A<|end|><|user|>B<|end|><|assistant|>"
    assert loaded.eos_token_id == tokenizer.EOS_ID and loaded.encode("<|end|>") == [tokenizer.EOS_ID]


def test_progress_runs_to_the_end(tmp_path: Path) -> None:
    steps: list[tuple[int, int]] = []
    make_checkpoint(tmp_path / "new", "v2-dense", progress=lambda made, total: steps.append((made, total)))
    assert [made for made, _ in steps] == sorted({made for made, _ in steps})
    assert {total for _, total in steps} == {steps[-1][0]}


def test_the_default_is_made_once_and_where_the_environment_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.delenv("FLASHMLA_BACKEND_CACHE", raising=False)
    folder = default_checkpoint()
    assert folder.parent == tmp_path / "xdg" / "flashmla_backend"
    stamp = (folder / "model.safetensors").stat().st_mtime_ns
    assert (default_checkpoint() / "model.safetensors").stat().st_mtime_ns == stamp

    monkeypatch.setenv("FLASHMLA_BACKEND_CACHE", str(tmp_path / "chosen"))
    assert checkpoint.cache_folder() == tmp_path / "chosen"


def test_an_interrupted_one_leaves_nothing(tmp_path: Path) -> None:
    def interrupt(made: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make_checkpoint(tmp_path / "new", "v2-moe", progress=interrupt)
    assert list(tmp_path.iterdir()) == []


def test_losing_the_race_for_the_cache_takes_the_winners(tmp_path: Path) -> None:
    winner = tmp_path / f"v2-moe-bfloat16-r{checkpoint.RECIPE}"

    def another_process_finishes(made: int, total: int) -> None:
        winner.mkdir(exist_ok=True)
        (winner / "config.json").touch()

    assert default_checkpoint(tmp_path, progress=another_process_finishes) == winner
    assert [path.name for path in winner.iterdir()] == ["config.json"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"architecture": "v4"}, r"architecture is 'v4'; accepted: 'v2-moe', 'v2-dense', 'v3-moe', 'v3-mtp'"),
        ({"dtype": "float8"}, r"dtype is 'float8'; accepted: 'float32', 'bfloat16'"),
        ({"seed": -1}, r"seed is -1; it must not be negative"),
        ({"path": Path(__file__).parent}, r"path is .*unit, which is not an empty folder"),
        ({"path": Path(__file__)}, r"path is .*test_checkpoint.py, which is not an empty folder"),
    ],
)
def test_bad_arguments_are_named(tmp_path: Path, arguments: dict[str, object], message: str) -> None:
    with pytest.raises(InvalidArgument, match=message):
        make_checkpoint(**{"path": tmp_path / "new", "architecture": "v2-moe", **arguments})  # type: ignore[arg-type]
