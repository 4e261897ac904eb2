"""The requests of a batch job: lengths and random prompts, the same for every backend."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence


def draw_lengths(prompts: int, input_tokens: int, output_tokens: int, spread: float) -> list[tuple[int, int]]:
    """Tokens of each prompt and of its answer, drawn evenly around these means.

    spread: of both, as a part of them: 0.5 draws from half to one and a half.
    """
    draw = random.Random(0)

    def near(mean: int) -> int:
        return draw.randint(math.ceil(mean * (1 - spread)), math.floor(mean * (1 + spread)))

    return [(near(input_tokens), near(output_tokens)) for _ in range(prompts)]


def draw_prompts(lengths: Sequence[int], vocabulary: int, seed: int) -> list[list[int]]:
    """Token ids below `vocabulary`."""
    draw = random.Random(seed)
    return [draw.choices(range(vocabulary), k=length) for length in lengths]
