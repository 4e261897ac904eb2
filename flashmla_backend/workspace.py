"""Memory that the layers of a plan write to and read back: partial results, and scratch in batch-invariant mode."""

from __future__ import annotations

import torch

from flashmla_backend.dispatch import default_num_sms, path_of
from flashmla_backend.errors import InvalidArgument
from flashmla_backend.leaves import max_leaves, room_floats
from flashmla_backend.paging import D_V, describe
from flashmla_backend.schedule import max_splits, num_parts, row_tiles_of

PARTIAL_WIDTH = D_V // 2  # fp32 elements' worth of a row of a partial output, which is fp16
ALIGNMENT = 128  # bytes: partial results are discarded from the L2 cache line by line


def workspace_size(
    device: torch.device,
    *,
    s_q: int,
    h_q: int,
    h_kv: int = 1,
    num_sms: int | None = None,
    batch_invariant: bool = False,
) -> int:
    """fp32 elements of workspace that such plans take, whatever their batch and lengths; 0 on the CPU."""
    parts = num_parts(num_sms or default_num_sms(device), row_tiles_of(s_q * h_q // h_kv, h_kv))
    return sum(workspace_sizes(path_of(device), parts, s_q * h_q // h_kv, h_kv, batch_invariant))


def workspace_sizes(path: str, parts: int, rows: int, h_kv: int, batch_invariant: bool) -> tuple[int, int, int]:
    """fp32 elements' worth for partial outputs, for rooms (of results that wait) and for partial LSEs."""
    if path != "sm90":
        return 0, 0, 0
    row_tiles, partial_rows = row_tiles_of(rows, h_kv), max_splits(parts) * h_kv * rows
    rooms = room_floats(rows, row_tiles * parts, max_leaves(row_tiles)) if batch_invariant else 0
    return partial_rows * PARTIAL_WIDTH, rooms, partial_rows * state_width(batch_invariant)


def state_width(batch_invariant: bool) -> int:
    """fp32 elements' worth beside a row of a partial output: its LSE and scales, or a state for each half of a node."""
    return 4 if batch_invariant else 2


def make_workspaces(
    path: str,
    part_offsets: torch.Tensor,
    rows: int,
    h_kv: int,
    batch_invariant: bool = False,
    storage: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Room for the results of any lengths: [max_splits, H_kv, rows, 256] fp32, each a pair of fp16 values;
    [max_splits, H_kv, rows, 2] of what belongs to the rows, in batch-invariant mode 4; and in that mode the thread
    blocks' scratch. All fp32: torch.compile wants views of one storage to be of one dtype.

    The first elements of `storage`, an fp32 vector that begins at a multiple of 128 bytes; by default newly allocated.
    """
    sizes = workspace_sizes(path, part_offsets.shape[0] - 1, rows, h_kv, batch_invariant)
    if storage is None:
        storage = part_offsets.new_empty(sum(sizes), dtype=torch.float32)
    if storage.dim() != 1 or storage.dtype != torch.float32 or storage.numel() < sum(sizes):
        raise InvalidArgument(f"workspace is {describe(storage)}; accepted: [{sum(sizes)}] float32, or longer")
    if storage.device != part_offsets.device:
        raise InvalidArgument(
            f"workspace is on {storage.device}, seq_lens on {part_offsets.device}; accepted: the same device"
        )
    if storage.is_cuda and storage.data_ptr() % ALIGNMENT:
        raise InvalidArgument(
            f"workspace begins {storage.data_ptr() % ALIGNMENT} bytes after a multiple of {ALIGNMENT}; accepted: a "
            "multiple, where torch's own allocations begin"
        )
    out, rooms, lse = storage[: sum(sizes)].split(sizes)
    return out.view(-1, h_kv, rows, PARTIAL_WIDTH), lse.view(-1, h_kv, rows, state_width(batch_invariant)), rooms
