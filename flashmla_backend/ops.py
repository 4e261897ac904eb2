"""The operators, registered with torch.library so that torch.compile and CUDA graphs see opaque calls.

    flashmla_backend::check_bounds    lengths, table -> lengths to plan, faults                once a step, if asked for
    flashmla_backend::schedule        seq_lens -> work items, part offsets, split offsets      once a step
    flashmla_backend::schedule_into   the same into buffers of an earlier step
    flashmla_backend::mla_decode      q, cache, plan -> out, lse                               once a layer

Output shapes depend on shapes and on the number of SMs alone, never on lengths.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch._ops import OpOverload

from flashmla_backend import bounds, cpu, sm90
from flashmla_backend.schedule import make_schedule, max_items, num_parts

Schedule = tuple[torch.Tensor, torch.Tensor, torch.Tensor]

_library = torch.library.Library("flashmla_backend", "DEF")


def operator(
    schema: str, *, on_cpu: Callable[..., object], on_cuda: Callable[..., object], fake: Callable[..., object]
) -> OpOverload:
    """Register an operator. Not by torch.library.custom_op: its wrappers take as long as all the rest of a call."""
    name = schema.partition("(")[0]
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(name, on_cpu, "CPU")
    _library.impl(name, on_cuda, "CUDA")
    torch.library.register_fake(f"flashmla_backend::{name}", fake, lib=_library)
    overload: OpOverload = getattr(torch.ops.flashmla_backend, name).default
    return overload


def schedule_on_cpu(
    seq_lens: torch.Tensor,
    row_tiles: int,
    num_sms: int,
    rows: int,
    batch_invariant: bool,
    items: torch.Tensor,
    part_offsets: torch.Tensor,
    split_offsets: torch.Tensor,
) -> None:
    """`schedule.make_schedule` as tensors, contiguous int32 on the device of the lengths.

    Args:
        seq_lens: [B] int32.
        row_tiles: `schedule.row_tiles_of(rows, h_kv)`.
        num_sms: thread blocks that run at once.
        rows: query rows of a request over all KV heads.
        batch_invariant: cut into subtrees of leaves only.
        items: [max_items, 4] (request, page_begin, page_end, split), part after part, unused rows -1.
        part_offsets: [parts + 1] into items.
        split_offsets: [B + 1] into the partial results.
    """
    made = make_schedule(seq_lens.tolist(), row_tiles, num_sms, rows, batch_invariant=batch_invariant)
    flat = [item for part in made.parts for item in part]
    items.fill_(-1)
    if flat:
        items[: len(flat)] = torch.tensor(flat, dtype=torch.int32)
    sizes = torch.tensor([0, *map(len, made.parts)], dtype=torch.int32)
    torch.cumsum(sizes, 0, dtype=torch.int32, out=part_offsets)
    split_offsets.copy_(torch.tensor(made.split_offsets, dtype=torch.int32))


def schedule_buffers(
    seq_lens: torch.Tensor, row_tiles: int, num_sms: int, rows: int, batch_invariant: bool = False
) -> Schedule:
    batch, parts = seq_lens.shape[0], num_parts(num_sms, row_tiles)
    items = seq_lens.new_empty((max_items(batch, parts), 4))
    return items, seq_lens.new_empty(parts + 1), seq_lens.new_empty(batch + 1)


def new_schedule(
    seq_lens: torch.Tensor, row_tiles: int, num_sms: int, rows: int, batch_invariant: bool = False
) -> Schedule:
    """items, part_offsets and split_offsets of `schedule_into`, newly allocated."""
    buffers = schedule_buffers(seq_lens, row_tiles, num_sms, rows)
    schedule_into(seq_lens, row_tiles, num_sms, rows, batch_invariant, *buffers)
    return buffers


def decode_on_cpu(
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
    """See `flashmla_backend.mla_decode`, which checks the arguments. The workspaces are the Hopper kernels' only."""
    if planned_lens is None or faults is None:
        cpu.check_plan_covers(items, seq_lens)
    else:
        seq_lens = bounds.planned_on_cpu(seq_lens, planned_lens, kv_cache.shape[1], faults)
    q = torch.cat([q_latent, q_rope], dim=-1)

    def decode(q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return cpu.decode(q, kv_cache, block_table, seq_lens, items, split_offsets, softmax_scale, causal, max_leaves)

    return decode(q) if query_offsets is None else cpu.decode_ragged(q, query_offsets, s_q, decode)


def empty_results(q_latent: torch.Tensor, *_: object) -> tuple[torch.Tensor, torch.Tensor]:
    """out [B, S_q, H_q, 512] in q's dtype and lse [B, S_q, H_q] fp32; of a ragged step [T, H_q, 512] and [T, H_q]."""
    shape = q_latent.shape
    return q_latent.new_empty(shape), q_latent.new_empty(shape[:-1], dtype=torch.float32)


check_bounds = operator(
    "check_bounds(Tensor seq_lens, Tensor block_table, int page_size, int num_pages, Tensor(a!) planned_lens, "
    "Tensor(b!) faults) -> ()",
    on_cpu=bounds.check_on_cpu,
    on_cuda=sm90.check_bounds,
    fake=lambda *_: None,
)
schedule_into = operator(
    "schedule_into(Tensor seq_lens, int row_tiles, int num_sms, int rows, bool batch_invariant, Tensor(a!) items, "
    "Tensor(b!) part_offsets, Tensor(c!) split_offsets) -> ()",
    on_cpu=schedule_on_cpu,
    on_cuda=sm90.schedule,
    fake=lambda *_: None,
)
schedule = operator(
    "schedule(Tensor seq_lens, int row_tiles, int num_sms, int rows, bool batch_invariant=False) -> "
    "(Tensor, Tensor, Tensor)",
    on_cpu=new_schedule,
    on_cuda=new_schedule,
    fake=schedule_buffers,
)
mla_decode = operator(
    "mla_decode(Tensor q_latent, Tensor q_rope, Tensor kv_cache, Tensor block_table, Tensor seq_lens, Tensor items, "
    "Tensor part_offsets, Tensor split_offsets, Tensor(a!) partial_out, Tensor(b!) partial_lse, Tensor(c!) rooms, "
    "float softmax_scale, bool causal, int max_leaves, int s_q, Tensor? query_offsets=None, "
    "Tensor? planned_lens=None, Tensor? faults=None) -> (Tensor, Tensor)",
    on_cpu=decode_on_cpu,
    on_cuda=sm90.decode,
    fake=empty_results,
)


def reschedule(seq_lens: torch.Tensor, *arguments: object) -> None:
    """`schedule_into`, on a GPU without the dispatcher, which takes longer than the launch, unless torch traces."""
    real = type(seq_lens) is torch.Tensor and not torch.compiler.is_compiling()
    launch = sm90.schedule if real and seq_lens.is_cuda else schedule_into
    launch(seq_lens, *arguments)  # type: ignore[arg-type]
