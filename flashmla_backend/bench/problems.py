"""Shapes to measure, and tensors for them: pages shuffled in a pool that caches cannot hold."""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import product

import torch

from flashmla_backend.paging import D_QK, D_V
from flashmla_backend.schedule import TILE_TOKENS, pages_of

PAGE_BYTES = TILE_TOKENS * D_QK * 2
CACHE_SWEEPS = 2.5  # bytes read between two uses of a page, in L2 sizes
MAX_ROTATIONS = 64


@dataclass(frozen=True)
class Shape:
    """One point of the grid. `kind` "fixed": all lengths are `length`; "var": normal around it, deviation half."""

    heads: int
    s_q: int
    batch: int
    length: int
    kind: str

    def lengths(self) -> list[int]:
        if self.kind == "fixed":
            return [self.length] * self.batch
        draw = random.Random(1234 + 7 * self.batch + self.length)
        shortest = max(2, self.s_q)
        return [max(shortest, int(draw.normalvariate(self.length, self.length / 2))) for _ in range(self.batch)]

    def pages(self) -> int:
        return sum(map(pages_of, self.lengths()))

    def rotations(self, l2_bytes: int) -> int:
        """Block tables to go through in turn, so that no page is still in L2 when it is read again."""
        return max(1, min(MAX_ROTATIONS, math.ceil(CACHE_SWEEPS * l2_bytes / (self.pages() * PAGE_BYTES))))


def grid(
    heads: Sequence[int], s_q: Sequence[int], batch: Sequence[int], lengths: Sequence[int], kinds: Sequence[str]
) -> list[Shape]:
    """All combinations; shuffled, so that a run cut short by its budget is still a fair sample."""
    shapes = [Shape(*point) for point in product(heads, s_q, batch, lengths, kinds)]
    shapes = [shape for shape in shapes if shape.kind == "fixed" or shape.batch > 1]
    random.Random(0).shuffle(shapes)
    return shapes


def make_pool(shapes: Iterable[Shape], l2_bytes: int, device: torch.device) -> torch.Tensor:
    """A cache [P, 64, 1, 576] bf16 large enough for each of the shapes."""
    pages = max(shape.pages() * shape.rotations(l2_bytes) for shape in shapes)
    pool = torch.empty(pages, TILE_TOKENS, 1, D_QK, dtype=torch.bfloat16, device=device)
    for some in pool.split(4096):
        some.normal_().clamp_(-4, 4)
    return pool


@dataclass(frozen=True)
class Problem:
    """One shape's tensors; call r of a contender uses queries[r] and block_tables[r]. Causal, bottom-right."""

    lengths: list[int]
    cache: torch.Tensor  # [P, 64, 1, 576] bf16
    seq_lens: torch.Tensor  # [B] int32
    queries: list[torch.Tensor]  # each [B, S_q, H_q, 576] bf16
    block_tables: list[torch.Tensor]  # each [B, W] int32
    page_ids: list[torch.Tensor]  # each [pages] int32: the block table's used entries, request after request
    softmax_scale: float

    @property
    def batch(self) -> int:
        return len(self.lengths)

    @property
    def s_q(self) -> int:
        return self.queries[0].shape[1]

    @property
    def heads(self) -> int:
        return self.queries[0].shape[2]

    @property
    def rotations(self) -> int:
        return len(self.queries)

    @property
    def spread(self) -> float:
        """The scores' standard deviation before softmax: queries and keys have one of 1."""
        return self.softmax_scale * D_QK**0.5

    @property
    def flops(self) -> int:
        """Of Q K^T and P V; the causal mask is not subtracted."""
        return 2 * self.s_q * sum(self.lengths) * self.heads * (D_QK + D_V)

    @property
    def bytes(self) -> int:
        """Each token's row once, Q and the output once."""
        return sum(self.lengths) * D_QK * 2 + self.batch * self.s_q * self.heads * (D_QK + D_V) * 2


def make_problem(
    pool: torch.Tensor,
    lengths: list[int],
    heads: int,
    s_q: int,
    rotations: int = 1,
    seed: int = 0,
    spread: float = 1.0,
) -> Problem:
    """Random queries and block tables over pages of the pool, no page in two tables; scores of that spread."""
    device = pool.device
    random_numbers = torch.Generator(device).manual_seed(seed)
    used = [pages_of(length) for length in lengths]
    total, width = sum(used), -(-max(used) // 4) * 4  # some kernels read a table's row 16 bytes at a time
    ids = torch.randperm(pool.shape[0], generator=random_numbers, device=device).int()
    mask = torch.arange(width, device=device) < torch.tensor(used, device=device)[:, None]  # [B, W]
    queries, tables, page_ids = [], [], []
    for r in range(rotations):
        own = ids[r * total : (r + 1) * total]
        table = torch.zeros(len(lengths), width, dtype=torch.int32, device=device)
        table[mask] = own
        q = torch.randn(len(lengths), s_q, heads, D_QK, generator=random_numbers, device=device)
        queries.append(q.clamp_(-4, 4).bfloat16())
        tables.append(table)
        page_ids.append(own)
    seq_lens = torch.tensor(lengths, dtype=torch.int32, device=device)
    return Problem(lengths, pool, seq_lens, queries, tables, page_ids, spread * D_QK**-0.5)
