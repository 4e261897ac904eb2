"""Calls of the compiled Hopper kernels: tensors become pointers, strides and a stream. Nothing here waits for the GPU.

The C ABI checks what it is given; its sentence becomes the error's.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch

from flashmla_backend import native
from flashmla_backend.errors import InvalidArgument, Unsupported
from flashmla_backend.leaves import max_leaves as max_leaves_of
from flashmla_backend.paging import D_QK
from flashmla_backend.schedule import CostModel

DTYPES = {torch.bfloat16: 0, torch.float16: 1}  # flashmla_dtype


@cache
def cost_of(rows: int) -> tuple[int, int, int, int, int, int]:
    """`flashmla_cost_model` for a number of query rows."""
    cost = CostModel()
    return cost.page, cost.item, cost.empty_item, cost.memory, cost.reduction, cost.of_partial(rows)


def schedule(
    seq_lens: torch.Tensor,
    row_tiles: int,
    num_sms: int,
    rows: int,
    batch_invariant: bool,
    items: torch.Tensor,
    part_offsets: torch.Tensor,
    split_offsets: torch.Tensor,
) -> None:
    """Enqueue the device scheduler; see `ops.schedule_on_cpu`. The offsets' size says how many parts there are."""
    enqueue(
        native.load().schedule,
        seq_lens.device,
        seq_lens.shape[0],
        part_offsets.shape[0] - 1,
        max_leaves_of(row_tiles) if batch_invariant else 0,
        cost_of(rows),
        seq_lens.data_ptr(),
        items.data_ptr(),
        part_offsets.data_ptr(),
        split_offsets.data_ptr(),
    )


def check_bounds(
    seq_lens: torch.Tensor,
    block_table: torch.Tensor,
    page_size: int,
    num_pages: int,
    planned_lens: torch.Tensor,
    faults: torch.Tensor,
) -> None:
    """Enqueue the check of lengths and table; see `bounds.check_on_cpu`."""
    enqueue(
        native.load().check_bounds,
        seq_lens.device,
        seq_lens.shape[0],
        page_size,
        num_pages,
        seq_lens.data_ptr(),
        block_table.data_ptr(),
        block_table.stride(0),
        block_table.shape[1],
        planned_lens.data_ptr(),
        faults.data_ptr(),
    )


def decode(
    q_latent: torch.Tensor,
    q_rope: torch.Tensor,
    kv_cache: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    items: torch.Tensor,
    part_offsets: torch.Tensor,
    split_offsets: torch.Tensor,
    partial_out: torch.Tensor,
    partial_lse: torch.Tensor,
    rooms: torch.Tensor,
    softmax_scale: float,
    causal: bool,
    max_leaves: int,
    s_q: int,
    query_offsets: torch.Tensor | None = None,
    planned_lens: torch.Tensor | None = None,
    faults: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Enqueue the decode and combine kernels; see `flashmla_backend.mla_decode`, which checks the arguments."""
    num_pages, page_size, h_kv, _ = kv_cache.shape
    out = q_latent.new_empty(q_latent.shape)
    lse = q_latent.new_empty(q_latent.shape[:-1], dtype=torch.float32)
    enqueue(
        native.load().decode,
        q_latent.device,
        DTYPES[q_latent.dtype],
        (seq_lens.shape[0], s_q, q_latent.shape[-2], h_kv),
        page_size,
        num_pages,
        part_offsets.shape[0] - 1,
        causal,
        softmax_scale,
        q_latent.data_ptr(),
        strides_of(q_latent),
        q_rope.data_ptr(),
        strides_of(q_rope),
        kv_cache.data_ptr(),
        strides_of(kv_cache),
        seq_lens.data_ptr(),
        block_table.data_ptr(),
        block_table.stride(0),
        items.data_ptr(),
        part_offsets.data_ptr(),
        split_offsets.data_ptr(),
        0 if query_offsets is None else query_offsets.data_ptr(),
        0 if planned_lens is None else planned_lens.data_ptr(),
        0 if faults is None else faults.data_ptr(),
        out.data_ptr(),
        lse.data_ptr(),
        partial_out.data_ptr(),
        partial_lse.data_ptr(),
        max_leaves,
        rooms.data_ptr(),
    )
    return out, lse


def enqueue(launch: Callable[..., None], device: torch.device, *arguments: object) -> None:
    """Launch on the device's current stream, which is the last argument; a refusal becomes an error of ours."""
    # current_stream() builds an object, torch.cuda.device() resolves and sets a device: each longer than our own part.
    stream = torch._C._cuda_getCurrentRawStream(device.index)
    try:
        if torch.cuda.current_device() == device.index:
            launch(*arguments, stream)
        else:
            with torch.cuda.device(device):
                launch(*arguments, stream)
    except (ValueError, RuntimeError) as error:
        raise translated(error) from None


def strides_of(tensor: torch.Tensor) -> tuple[int, int, int]:
    """Strides of the three dimensions before the last; that of one of size 1, or missing, means nothing."""
    *outer, b, c, _ = tensor.stride()
    *more, y, z, _ = tensor.shape
    return outer[0] if outer and more[0] > 1 else D_QK, b if y > 1 else D_QK, c if z > 1 else D_QK


def translated(error: ValueError | RuntimeError) -> InvalidArgument | Unsupported:
    return InvalidArgument(str(error)) if isinstance(error, ValueError) else Unsupported(str(error))
