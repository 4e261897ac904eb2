"""What Hugging Face transformers generates greedily in fp32, which every engine must equal, token for token."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

NEW_TOKENS = 40
# Both sides of the edges of 64- and 128-token pages, also by what decode adds.
LENGTHS = (1, 2, 17, 40, 63, 64, 65, 127, 128, 129, 192, 230)
SHARED = 280  # tokens of the common prefix: over one page of 256, four of 64
TAILS = (1, 9, 63)
MARGIN = 1e-3  # between the best and the second-best logit; fp32 engines differ by about 1e-5 here


@dataclass(frozen=True)
class Reference:
    """Prompts, and the greedy continuation of each by Hugging Face transformers in fp32."""

    prompts: list[list[int]]
    tokens: list[list[int]]


def generate(folder: Path) -> tuple[Reference, Reference]:
    """For a checkpoint: independent prompts, the last of them the prefix; then prompts that begin with it."""
    from transformers import AutoModelForCausalLM

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a model this small only loses time to a second one
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        alone = [_decided_prompt(model, [], length) for length in (*LENGTHS, SHARED)]
        prefix, _ = alone[-1]
        sharing = [_decided_prompt(model, prefix, length) for length in TAILS]
    finally:
        torch.set_num_threads(threads)
    first, second = (Reference(*map(list, zip(*pairs, strict=True))) for pairs in (alone, sharing))
    return first, second


def _decided_prompt(model: Any, prefix: list[int], length: int) -> tuple[list[int], list[int]]:
    """`prefix` and then `length` random tokens, such that no greedy step after them is a near tie."""
    for seed in range(20):
        generator = torch.Generator().manual_seed(1000 * length + seed)
        drawn = torch.randint(5, model.config.vocab_size, (length,), generator=generator).tolist()
        prompt = prefix + drawn
        ids = torch.tensor([prompt])
        output = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=NEW_TOKENS,
            eos_token_id=None,
            pad_token_id=0,
            output_logits=True,
            return_dict_in_generate=True,
        )
        best, second = torch.cat(output.logits).topk(2).values.unbind(-1)
        if (best - second).min() >= MARGIN:
            return prompt, output.sequences[0, len(prompt) :].tolist()
    pytest.fail(f"no prompt of {length} tokens without near ties in 20 tries")
