"""Engine pages presented as 64-token tiles.

Engines keep the latent cache in pages of 16 to 256 tokens; kernels and the scheduler speak of tiles of 64. A *run*
is the longest stretch both agree on, min(page_size, 64) tokens that lie together: a tile is one or more runs, a page
is one or more runs. `PagedKV` holds the cache as a view of runs and the block table in runs; nothing is copied.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from flashmla_backend.errors import InvalidArgument
from flashmla_backend.schedule import TILE_TOKENS

D_QK = 576  # 512 latent + 64 rope
D_V = 512  # the same latent
PAGE_SIZES = (16, 32, 64, 128, 256)


@dataclass(frozen=True)
class PagedKV:
    """The cache of one layer and where each request's tokens lie in it."""

    runs: torch.Tensor  # [R, run_tokens, H_kv, 576], a view of the engine's cache
    run_table: torch.Tensor  # [B, W * runs_per_page] int64
    run_tokens: int

    def gather(self, request: int, begin: int, end: int) -> torch.Tensor:
        """Tokens [begin, end) of a request, `begin` a multiple of 64: [end - begin, H_kv, 576].

        Table entries and rows past `end` never reach the result.
        """
        first, last = begin // self.run_tokens, -(-end // self.run_tokens)
        tokens = self.runs.index_select(0, self.run_table[request, first:last]).flatten(0, 1)
        return tokens[: end - begin]


def check_page_size(page_size: int) -> None:
    if page_size not in PAGE_SIZES:
        accepted = ", ".join(map(str, PAGE_SIZES))
        raise InvalidArgument(f"page_size is {page_size}; accepted: {accepted} tokens")


def check_block_table(block_table: torch.Tensor, seq_lens: torch.Tensor, page_size: int) -> None:
    """Check types and shapes."""
    check_page_size(page_size)
    if seq_lens.dim() != 1 or seq_lens.dtype != torch.int32:
        raise InvalidArgument(f"seq_lens is {describe(seq_lens)}; accepted: [B] int32")
    if seq_lens.shape[0] > 1 and seq_lens.stride(0) != 1:
        raise InvalidArgument(f"seq_lens has strides {tuple(seq_lens.stride())}; accepted: a contiguous vector")
    if block_table.dim() != 2 or block_table.dtype != torch.int32:
        raise InvalidArgument(f"block_table is {describe(block_table)}; accepted: [B, W] int32")
    if block_table.shape[0] != seq_lens.shape[0]:
        raise InvalidArgument(
            f"block_table has {block_table.shape[0]} rows for seq_lens of {seq_lens.shape[0]} requests; "
            "accepted: the same number"
        )
    if block_table.device != seq_lens.device:
        raise InvalidArgument(
            f"block_table is on {block_table.device}, seq_lens on {seq_lens.device}; accepted: the same device"
        )
    if block_table.shape[1] > 0 and block_table.stride(1) != 1:
        raise InvalidArgument(
            f"block_table has strides {tuple(block_table.stride())}; accepted: a contiguous last dimension"
        )


def check_lengths(block_table: torch.Tensor, seq_lens: torch.Tensor, page_size: int) -> None:
    """Check on the CPU that every length fits the width of a table that `check_block_table` has passed."""
    if seq_lens.device.type != "cpu" or seq_lens.numel() == 0:
        return
    shortest, longest = int(seq_lens.min()), int(seq_lens.max())
    if shortest < 0:
        raise InvalidArgument(f"seq_lens contains {shortest}; accepted: 0 or more tokens")
    if longest > block_table.shape[1] * page_size:
        raise InvalidArgument(
            f"block_table is {block_table.shape[1]} pages of {page_size} tokens wide, too narrow for a request "
            f"of {longest} tokens; accepted: at least {-(-longest // page_size)} pages"
        )


def check_kv_cache(kv_cache: torch.Tensor, page_size: int, h_kv: int) -> None:
    """Check shape and strides of the engine's cache of one layer."""
    expected = f"[P, {page_size}, {h_kv}, {D_QK}]"
    if kv_cache.dim() != 4 or kv_cache.shape[3] != D_QK:
        raise InvalidArgument(f"kv_cache is {describe(kv_cache)}; accepted: {expected}")
    if kv_cache.shape[1] != page_size:
        raise InvalidArgument(
            f"kv_cache holds pages of {kv_cache.shape[1]} tokens, the plan was made for page_size {page_size}"
        )
    if kv_cache.shape[2] != h_kv:
        raise InvalidArgument(f"kv_cache has {kv_cache.shape[2]} KV heads, the plan was made for h_kv {h_kv}")
    if kv_cache.stride(3) != 1:
        raise InvalidArgument(f"kv_cache has strides {tuple(kv_cache.stride())}; accepted: a contiguous last dimension")
    page_stride, row_stride = kv_cache.stride(0), kv_cache.stride(1)
    if page_size > TILE_TOKENS and kv_cache.shape[0] > 1 and page_stride % (TILE_TOKENS * row_stride):
        raise InvalidArgument(
            f"kv_cache has a page stride of {page_stride} elements; accepted for pages of {page_size} tokens: a "
            f"multiple of {TILE_TOKENS} rows of {row_stride} elements"
        )


def check_page_ids(block_table: torch.Tensor, seq_lens: torch.Tensor, page_size: int, num_pages: int) -> None:
    """Check every table entry that will be followed; entries past a request's length may hold anything."""
    used_pages = (seq_lens.long() + page_size - 1) // page_size  # [B]
    used = torch.arange(block_table.shape[1], device=block_table.device) < used_pages[:, None]
    wrong = used & ((block_table < 0) | (block_table >= num_pages))
    if bool(wrong.any()):
        request, column = wrong.nonzero()[0].tolist()
        raise InvalidArgument(
            f"block_table[{request}, {column}] is {int(block_table[request, column])}; accepted: 0 to "
            f"{num_pages - 1}, the pages of kv_cache"
        )


def present_as_tiles(kv_cache: torch.Tensor, block_table: torch.Tensor) -> PagedKV:
    """View a checked cache [P, page_size, H_kv, 576] and table [B, W] as runs of min(page_size, 64) tokens."""
    pages, page_size, h_kv, width = kv_cache.shape
    table = block_table.long()
    if page_size <= TILE_TOKENS:
        return PagedKV(kv_cache, table, page_size)
    page_stride, row_stride, head_stride, _ = kv_cache.stride()
    run_stride = TILE_TOKENS * row_stride
    runs_per_page = page_size // TILE_TOKENS
    page_step = page_stride // run_stride if pages > 1 else runs_per_page  # runs from one page to the next
    runs = kv_cache.as_strided(
        ((pages - 1) * page_step + runs_per_page, TILE_TOKENS, h_kv, width),
        (run_stride, row_stride, head_stride, 1),
    )
    run_table = table[:, :, None] * page_step + torch.arange(runs_per_page, device=table.device)
    return PagedKV(runs, run_table.flatten(1), TILE_TOKENS)


def describe(tensor: torch.Tensor) -> str:
    """`[2, 64] torch.int64`, for error messages."""
    return f"{list(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"
