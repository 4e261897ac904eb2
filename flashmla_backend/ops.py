"""The two operators, registered with torch.library so that torch.compile and CUDA graphs see opaque calls.

    flashmla_backend::schedule     seq_lens -> work items, part offsets, split offsets      once a step
    flashmla_backend::mla_decode   q, cache, plan -> out, lse                               once a layer

Output shapes depend on shapes and on the number of SMs alone, never on lengths.
"""

from __future__ import annotations

import torch

from flashmla_backend import cpu
from flashmla_backend.paging import D_V
from flashmla_backend.schedule import make_schedule, max_items, num_parts


@torch.library.custom_op("flashmla_backend::schedule", mutates_args=(), device_types="cpu")
def schedule(seq_lens: torch.Tensor, row_tiles: int, num_sms: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`schedule.make_schedule` as tensors.

    Args:
        seq_lens: [B] int32.
        row_tiles: `schedule.row_tiles_of(rows, h_kv)`.
        num_sms: thread blocks that run at once.

    Returns:
        items [max_items, 4] int32 (request, page_begin, page_end, split), part after part, unused rows -1;
        part_offsets [parts + 1] int32 into items; split_offsets [B + 1] int32 into the partial results.
    """
    made = make_schedule(seq_lens.tolist(), row_tiles, num_sms)
    flat = [item for part in made.parts for item in part]
    items = seq_lens.new_full((max_items(len(seq_lens), len(made.parts)), 4), -1)
    if flat:
        items[: len(flat)] = torch.tensor(flat, dtype=torch.int32)
    sizes = torch.tensor([0, *map(len, made.parts)], dtype=torch.int32)
    return items, sizes.cumsum(0, dtype=torch.int32), torch.tensor(made.split_offsets, dtype=torch.int32)


@schedule.register_fake
def _(seq_lens: torch.Tensor, row_tiles: int, num_sms: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    batch, parts = seq_lens.shape[0], num_parts(num_sms, row_tiles)
    items = seq_lens.new_empty((max_items(batch, parts), 4))
    return items, seq_lens.new_empty(parts + 1), seq_lens.new_empty(batch + 1)


@torch.library.custom_op("flashmla_backend::mla_decode", mutates_args=(), device_types="cpu")
def mla_decode(
    q: torch.Tensor,
    kv_cache: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    items: torch.Tensor,
    part_offsets: torch.Tensor,
    split_offsets: torch.Tensor,
    softmax_scale: float,
    causal: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `flashmla_backend.mla_decode`; arguments are checked there.

    Returns out [B, S_q, H_q, 512] in q's dtype and lse [B, S_q, H_q] fp32.
    """
    return cpu.decode(q, kv_cache, block_table, seq_lens, items, split_offsets, softmax_scale, causal)


@mla_decode.register_fake
def _(
    q: torch.Tensor,
    kv_cache: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    items: torch.Tensor,
    part_offsets: torch.Tensor,
    split_offsets: torch.Tensor,
    softmax_scale: float,
    causal: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    return q.new_empty((*q.shape[:3], D_V)), q.new_empty(q.shape[:3], dtype=torch.float32)
