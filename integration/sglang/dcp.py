"""Decode context parallelism (DCP): each of N ranks caches every N-th token, and the ranks' outputs are merged by LSE.

SGLang's rule: slots count the rows of all ranks by turns. Slot s is row s // N of rank s % N, and the allocator's pages
begin at multiples of N times the page size, so token t of a request belongs to rank t % N. For decode SGLang's models
gather the queries of all ranks; for prompts they gather the cached tokens, then the new ones, in one buffer per layer.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from flashmla_backend.paging import D_V


@dataclass(frozen=True)
class Share:
    """What one rank caches; by default all there is."""

    rank: int = 0
    ranks: int = 1

    def lengths_(self, lengths: torch.Tensor) -> None:
        """Tokens of whole requests become this rank's of them, in place. lengths: int, any shape."""
        if self.ranks > 1:
            lengths.add_(self.ranks - 1 - self.rank).div_(self.ranks, rounding_mode="floor")

    def write(self, cache: torch.Tensor, slots: torch.Tensor, rows: torch.Tensor) -> None:
        """This rank's of some new rows into its cache. cache: [rows, 1, 576]; slots: [T] int; rows: [T, 1, 576].

        Waits for the device.
        """
        own = slots % self.ranks == self.rank
        cache[slots[own] // self.ranks] = rows[own]


WHOLE = Share()


class GatheredPool:
    """Stands in for the pool of the cache where the tokens of prompts are read: [tokens, 1, 576], of all ranks."""

    def __init__(self, rows: torch.Tensor) -> None:
        self.rows = rows

    def get_key_buffer(self, layer_id: int) -> torch.Tensor:
        return self.rows

    def get_value_buffer(self, layer_id: int) -> torch.Tensor:
        return self.rows[..., :D_V]


@contextmanager
def reading_gathered(backend: Any, forward_batch: Any) -> Iterator[None]:
    """A backend reads what SGLang gathered of the ranks' caches for this layer, if it did, instead of its own."""
    gathered, pool = forward_batch.attn_dcp_metadata, backend.token_to_kv_pool
    if gathered is not None:
        backend.token_to_kv_pool = GatheredPool(gathered.dcp_kv_buffer)
    try:
        yield
    finally:
        backend.token_to_kv_pool = pool
