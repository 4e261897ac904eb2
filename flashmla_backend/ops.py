"""The operators, registered with torch.library so that torch.compile and CUDA graphs see opaque calls.

    flashmla_backend::schedule        seq_lens -> work items, part offsets, split offsets      once a step
    flashmla_backend::schedule_into   the same into buffers of an earlier step
    flashmla_backend::mla_decode      q, cache, plan -> out, lse                               once a layer

Output shapes depend on shapes and on the number of SMs alone, never on lengths.
"""

from __future__ import annotations

import torch

from flashmla_backend import cpu, sm90
from flashmla_backend.paging import D_V
from flashmla_backend.schedule import make_schedule, max_items, num_parts


@torch.library.custom_op(
    "flashmla_backend::schedule_into",
    mutates_args=("items", "part_offsets", "split_offsets"),
    device_types="cpu",
)
def schedule_into(
    seq_lens: torch.Tensor,
    row_tiles: int,
    num_sms: int,
    items: torch.Tensor,
    part_offsets: torch.Tensor,
    split_offsets: torch.Tensor,
) -> None:
    """`schedule.make_schedule` as tensors, contiguous int32 on the device of the lengths.

    Args:
        seq_lens: [B] int32.
        row_tiles: `schedule.row_tiles_of(rows, h_kv)`.
        num_sms: thread blocks that run at once.
        items: [max_items, 4] (request, page_begin, page_end, split), part after part, unused rows -1.
        part_offsets: [parts + 1] into items.
        split_offsets: [B + 1] into the partial results.
    """
    made = make_schedule(seq_lens.tolist(), row_tiles, num_sms)
    flat = [item for part in made.parts for item in part]
    items.fill_(-1)
    if flat:
        items[: len(flat)] = torch.tensor(flat, dtype=torch.int32)
    sizes = torch.tensor([0, *map(len, made.parts)], dtype=torch.int32)
    torch.cumsum(sizes, 0, dtype=torch.int32, out=part_offsets)
    split_offsets.copy_(torch.tensor(made.split_offsets, dtype=torch.int32))


@schedule_into.register_kernel("cuda")
def _(
    seq_lens: torch.Tensor,
    row_tiles: int,
    num_sms: int,
    items: torch.Tensor,
    part_offsets: torch.Tensor,
    split_offsets: torch.Tensor,
) -> None:
    sm90.schedule(seq_lens, row_tiles, items, part_offsets, split_offsets)


@torch.library.custom_op("flashmla_backend::schedule", mutates_args=(), device_types=("cpu", "cuda"))
def schedule(seq_lens: torch.Tensor, row_tiles: int, num_sms: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """items, part_offsets and split_offsets of `schedule_into`, newly allocated."""
    buffers = schedule_buffers(seq_lens, row_tiles, num_sms)
    schedule_into(seq_lens, row_tiles, num_sms, *buffers)
    return buffers


@schedule.register_fake
def schedule_buffers(
    seq_lens: torch.Tensor, row_tiles: int, num_sms: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    batch, parts = seq_lens.shape[0], num_parts(num_sms, row_tiles)
    items = seq_lens.new_empty((max_items(batch, parts), 4))
    return items, seq_lens.new_empty(parts + 1), seq_lens.new_empty(batch + 1)


@torch.library.custom_op(
    "flashmla_backend::mla_decode", mutates_args=("partial_out", "partial_lse"), device_types="cpu"
)
def mla_decode(
    q: torch.Tensor,
    kv_cache: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    items: torch.Tensor,
    part_offsets: torch.Tensor,
    split_offsets: torch.Tensor,
    partial_out: torch.Tensor,
    partial_lse: torch.Tensor,
    softmax_scale: float,
    causal: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `flashmla_backend.mla_decode`; arguments are checked there.

    Returns out [B, S_q, H_q, 512] in q's dtype and lse [B, S_q, H_q] fp32.
    """
    return cpu.decode(q, kv_cache, block_table, seq_lens, items, split_offsets, softmax_scale, causal)


mla_decode.register_kernel("cuda")(sm90.decode)


@mla_decode.register_fake
def _(
    q: torch.Tensor,
    kv_cache: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    items: torch.Tensor,
    part_offsets: torch.Tensor,
    split_offsets: torch.Tensor,
    partial_out: torch.Tensor,
    partial_lse: torch.Tensor,
    softmax_scale: float,
    causal: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    return q.new_empty((*q.shape[:3], D_V)), q.new_empty(q.shape[:3], dtype=torch.float32)
