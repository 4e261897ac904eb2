"""Calls of the compiled Hopper kernels: tensors become pointers, strides and a stream. Nothing here waits for the GPU.

The C ABI checks what it is given; its sentence becomes the error's.
"""

from __future__ import annotations

import torch

from flashmla_backend import native
from flashmla_backend.errors import InvalidArgument, Unsupported
from flashmla_backend.paging import D_QK, D_V
from flashmla_backend.schedule import CostModel

DTYPES = {torch.bfloat16: 0, torch.float16: 1}  # flashmla_dtype
PAGE_SIZES = (64, 128, 256)


def cost_of(row_tiles: int) -> tuple[int, int, int, int, int]:
    """`flashmla_cost_model` for a number of row tiles."""
    cost = CostModel()
    page = cost.lone_page if row_tiles == 1 else cost.page
    return page, cost.item, cost.empty_item, cost.reduction, cost.reduction_per_split


def schedule(
    seq_lens: torch.Tensor,
    row_tiles: int,
    items: torch.Tensor,
    part_offsets: torch.Tensor,
    split_offsets: torch.Tensor,
) -> None:
    """Enqueue the device scheduler; see `ops.schedule_into`."""
    module = native.load()
    with torch.cuda.device(seq_lens.device):
        try:
            module.schedule(
                seq_lens.shape[0],
                part_offsets.shape[0] - 1,
                cost_of(row_tiles),
                seq_lens.data_ptr(),
                items.data_ptr(),
                part_offsets.data_ptr(),
                split_offsets.data_ptr(),
                torch.cuda.current_stream().cuda_stream,
            )
        except (ValueError, RuntimeError) as error:
            raise translated(error) from None


def decode(
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
    """Enqueue the decode and combine kernels; see `ops.mla_decode`."""
    module = native.load()
    batch, s_q, h_q, _ = q.shape
    out = torch.empty((batch, s_q, h_q, D_V), dtype=q.dtype, device=q.device)
    lse = torch.empty((batch, s_q, h_q), dtype=torch.float32, device=q.device)
    with torch.cuda.device(q.device):
        try:
            module.decode(
                DTYPES[q.dtype],
                (batch, s_q, h_q, kv_cache.shape[2]),
                kv_cache.shape[1],
                kv_cache.shape[0],
                part_offsets.shape[0] - 1,
                causal,
                softmax_scale,
                q.data_ptr(),
                strides_of(q),
                kv_cache.data_ptr(),
                strides_of(kv_cache),
                seq_lens.data_ptr(),
                block_table.data_ptr(),
                block_table.stride(0),
                items.data_ptr(),
                part_offsets.data_ptr(),
                split_offsets.data_ptr(),
                out.data_ptr(),
                lse.data_ptr(),
                partial_out.data_ptr(),
                partial_lse.data_ptr(),
                torch.cuda.current_stream().cuda_stream,
            )
        except (ValueError, RuntimeError) as error:
            raise translated(error) from None
    return out, lse


def strides_of(tensor: torch.Tensor) -> tuple[int, int, int]:
    """Strides of the three outer dimensions; that of a dimension of size 1 means nothing and may be anything."""
    a, b, c = (tensor.stride(i) if tensor.shape[i] > 1 else D_QK for i in range(3))
    return a, b, c


def translated(error: ValueError | RuntimeError) -> InvalidArgument | Unsupported:
    return InvalidArgument(str(error)) if isinstance(error, ValueError) else Unsupported(str(error))
