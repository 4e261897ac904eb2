"""The public API: plan a decode step once, then decode every layer with that plan."""

from __future__ import annotations

import math
from typing import Any

import torch

from flashmla_backend import bounds, flashinfer_path, ops
from flashmla_backend.bounds import Bounds
from flashmla_backend.dispatch import DTYPES, default_num_sms, path_of
from flashmla_backend.errors import InvalidArgument, Unsupported
from flashmla_backend.leaves import max_leaves
from flashmla_backend.paging import D_QK, D_V, check_block_table, check_kv_cache, check_lengths, describe
from flashmla_backend.plan import Buffers, DecodePlan
from flashmla_backend.schedule import num_parts, row_tiles_of
from flashmla_backend.workspace import make_workspaces


def plan_decode(
    seq_lens: torch.Tensor,
    block_table: torch.Tensor,
    *,
    s_q: int,
    h_q: int,
    h_kv: int = 1,
    page_size: int = 64,
    causal: bool = True,
    batch_invariant: bool = False,
    num_sms: int | None = None,
    reuse: DecodePlan | None = None,
    workspace: torch.Tensor | None = None,
    num_pages: int | None = None,
) -> DecodePlan:
    """Schedule one decode step. Call once per step; every layer shares the plan.

    Args:
        seq_lens: [B] int32, tokens in the cache of each request, the `s_q` new ones included; 0 is an empty row.
        block_table: [B, W] int32 page ids on the same device. Entries past a request's last page are never followed.
        s_q: query tokens per request, the same for all (more than 1 for speculative decoding).
        h_q: query heads.
        h_kv: KV heads; `h_q` must be a multiple.
        page_size: tokens per page of the cache: 16, 32, 64, 128 or 256.
        causal: mask bottom-right: query i sees tokens up to len - s_q + i.
        batch_invariant: give each request the same bits whatever shares its batch, wherever it stands in it and
            wherever its pages lie, for the same `s_q`, `h_q`, `h_kv`, `causal` and dtype; slower.
        num_sms: thread blocks that run at once; by default the device's SM count, on the CPU torch's thread count.
        reuse: an earlier plan of the same shapes, made for at least as many requests, whose buffers then hold the new
            schedule; it can be reused again, and is of no other use any more. Layers captured in a CUDA graph with
            a plan of as many requests read the new schedule when replayed (pad a smaller step with lengths of 0); they
            also read `seq_lens` and `block_table` where these lay at capture, so keep both in persistent tensors. The
            call itself may be captured too.
        workspace: fp32 vector of at least `workspace_size(...)` elements on the same device for the partial results,
            from a multiple of 128 bytes on; by default one is allocated. Plans may share it if their layers run one
            after another, on one stream.
        num_pages: pages of the cache, `kv_cache.shape[0]`. Needed, and used, with FLASHMLA_CHECK_BOUNDS=1 only; by
            default that of `reuse`.

    Returns:
        A plan: same lengths, shapes and `num_sms`, same plan.

    Raises:
        InvalidArgument: naming the argument, what it was and what is accepted. Values of `seq_lens` are checked on
            the CPU only, since looking at them on a GPU would stall it.
        OutOfBounds: with FLASHMLA_CHECK_BOUNDS=1, if an earlier step on this device was given page ids or lengths out
            of bounds; nothing is planned then, and the next call goes on.
        Unsupported: the tensors are on a device that nothing installed has kernels for.
    """
    check_positive_int("s_q", s_q)
    check_heads(h_q, h_kv)
    check_block_table(block_table, seq_lens, page_size)
    path = path_of(seq_lens.device)
    if num_sms is None:
        num_sms = default_num_sms(seq_lens.device)
    check_positive_int("num_sms", num_sms)
    shape: dict[str, Any] = {"s_q": s_q, "h_q": h_q, "h_kv": h_kv, "page_size": page_size, "causal": causal}
    if path == "flashinfer":
        if bounds.enabled():
            raise Unsupported(
                f"{bounds.VARIABLE}=1 was set: FlashInfer serves {seq_lens.device}, and its kernels check nothing; "
                "unset the variable"
            )
        if batch_invariant:
            raise Unsupported(f"batch_invariant is True: FlashInfer serves {seq_lens.device}, which has no such mode")
        if reuse is not None:
            raise Unsupported(
                f"reuse was given: FlashInfer serves {seq_lens.device}, and its plans cannot be rewritten"
            )
        empty = torch.empty(0, dtype=torch.int32, device=seq_lens.device)
        made = flashinfer_path.plan(seq_lens, block_table, **shape)
        return DecodePlan(seq_lens, block_table, empty, empty, empty, empty, empty, empty, **shape, flashinfer=made)
    row_tiles = row_tiles_of(s_q * h_q // h_kv, h_kv)
    most_leaves = max_leaves(row_tiles) if batch_invariant else 0
    if reuse is None:
        checked = bounds.new_bounds(seq_lens, num_pages)
        planned_lens = checked_lengths(seq_lens, block_table, page_size, checked)
        buffers = new_schedule(planned_lens, s_q * h_q, h_kv, num_sms, workspace, batch_invariant)
        shape |= {"num_sms": num_sms, "max_leaves": most_leaves}
        return DecodePlan(seq_lens, block_table, *buffers, **shape, bounds=checked)
    if workspace is not None:
        raise InvalidArgument("workspace and reuse were both given; accepted: one, since a reused plan keeps its own")
    check_reusable(reuse, seq_lens, row_tiles, num_sms, {**shape, "batch_invariant": batch_invariant})
    return replan(reuse, seq_lens, block_table, num_pages)


def replan(
    plan: DecodePlan, seq_lens: torch.Tensor, block_table: torch.Tensor, num_pages: int | None = None
) -> DecodePlan:
    """`plan_decode(..., reuse=plan)` for those who know that the plan's shapes are theirs: half the host's time."""
    plan = plan.of_step(seq_lens, block_table, num_pages)
    planned_lens = checked_lengths(seq_lens, block_table, plan.page_size, plan.bounds)
    row_tiles, rows = row_tiles_of(plan.s_q * plan.h_q // plan.h_kv, plan.h_kv), plan.s_q * plan.h_q
    schedule = plan.items, plan.part_offsets, plan.split_offsets
    ops.reschedule(planned_lens, row_tiles, plan.num_sms, rows, plan.batch_invariant, *schedule)
    return plan


def new_schedule(
    planned_lens: torch.Tensor,
    rows: int,
    h_kv: int,
    num_sms: int,
    workspace: torch.Tensor | None,
    batch_invariant: bool = False,
) -> Buffers:
    """Of a plan: work items, part and split offsets, and the workspaces. rows: query rows over all KV heads."""
    schedule = ops.schedule(planned_lens, row_tiles_of(rows // h_kv, h_kv), num_sms, rows, batch_invariant)
    path = path_of(planned_lens.device)
    return *schedule, *make_workspaces(path, schedule[1], rows // h_kv, h_kv, batch_invariant, workspace)


def checked_lengths(
    seq_lens: torch.Tensor, block_table: torch.Tensor, page_size: int, checked: Bounds | None
) -> torch.Tensor:
    """The lengths to plan. A fault of an earlier step comes first; this one's is told by a later one."""
    if checked is None:
        check_lengths(block_table, seq_lens, page_size)
        return seq_lens
    checked.faults.raise_first()
    ops.check_bounds(seq_lens, block_table, page_size, checked.num_pages, checked.planned_lens, checked.faults.box)
    return checked.planned_lens


def check_reusable(
    reuse: DecodePlan, seq_lens: torch.Tensor, row_tiles: int, num_sms: int, shape: dict[str, Any]
) -> None:
    parts = reuse.part_offsets.shape[0] - 1
    made_for = [parts, reuse.items.device, *(getattr(reuse, name) for name in shape)]
    wanted = [num_parts(num_sms, row_tiles), seq_lens.device, *shape.values()]
    if made_for != wanted or reuse.batch < seq_lens.shape[0]:
        names = ("parts", "device", *shape)
        raise InvalidArgument(
            f"reuse was made for {reuse.batch} requests, {dict(zip(names, made_for, strict=True))}; accepted for this "
            f"step: {seq_lens.shape[0]} or more requests, {dict(zip(names, wanted, strict=True))}"
        )


def mla_decode(
    q: torch.Tensor | tuple[torch.Tensor, torch.Tensor],
    kv_cache: torch.Tensor,
    plan: DecodePlan,
    *,
    softmax_scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Absorbed multi-head latent attention of one layer over the paged latent cache (arXiv:2405.04434, section 2.1).

    Args:
        q: [B, S_q, H_q, 576] bf16 or fp16, on the CPU also fp32: 512 latent columns, then 64 rope columns. Or the two
            as a pair, [B, S_q, H_q, 512] and [B, S_q, H_q, 64], which need not lie side by side. In a ragged step
            [T, H_q, 576], or the pair of that, as are out and lse.
        kv_cache: [P, page_size, H_kv, 576], q's dtype; V is its first 512 columns. Page and row strides are free.
        plan: from `plan_decode` or `plan_ragged_decode`, for these shapes and these lengths.
        softmax_scale: factor on q @ k before the softmax, greater than 0; for DeepSeek models (128 + 64) ** -0.5 times
            the square of yarn's mscale, not 576 ** -0.5.

    Returns:
        out [B, S_q, H_q, 512] in q's dtype, and lse [B, S_q, H_q] fp32, the natural log of the sum of exponentials.
        A query that sees no token has out 0 and lse -inf.

    Raises:
        InvalidArgument: naming the argument, what it was and what is accepted.
        Unsupported: the tensors are on a device that nothing installed has kernels for.
    """
    q_latent, q_rope = checked_query(q, plan)
    check_kv_cache(kv_cache, plan.page_size, plan.h_kv)
    if kv_cache.dtype != q_latent.dtype or kv_cache.device != q_latent.device:
        raise InvalidArgument(
            f"kv_cache is {describe(kv_cache)} on {kv_cache.device}, q (latent columns) {describe(q_latent)} on "
            f"{q_latent.device}; accepted: the same dtype and device"
        )
    check_softmax_scale(softmax_scale)
    planned_lens = faults = None
    if plan.bounds is not None:
        plan.bounds.check_num_pages(kv_cache)
        if plan.query_offsets is None:  # a ragged step's plan has lengths of its own, which nobody changes
            planned_lens, faults = plan.bounds.planned_lens, plan.bounds.faults.box
    if plan.flashinfer is not None:
        return flashinfer_path.decode(q_latent, q_rope, kv_cache, plan.flashinfer, float(softmax_scale))
    return ops.mla_decode(
        q_latent,
        q_rope,
        kv_cache,
        plan.block_table,
        plan.seq_lens,
        plan.items,
        plan.part_offsets,
        plan.split_offsets,
        plan.partial_out,
        plan.partial_lse,
        plan.rooms,
        float(softmax_scale),
        plan.causal,
        plan.max_leaves,
        plan.s_q,
        plan.query_offsets,
        planned_lens,
        faults,
    )


def checked_query(
    q: torch.Tensor | tuple[torch.Tensor, torch.Tensor], plan: DecodePlan
) -> tuple[torch.Tensor, torch.Tensor]:
    """Latent and rope columns of q."""
    if isinstance(q, torch.Tensor):
        check_query("q", q, D_QK, plan)
        return q[..., :D_V], q[..., D_V:]
    if not isinstance(q, tuple) or len(q) != 2:
        raise InvalidArgument(
            f"q is a {type(q).__name__}; accepted: a tensor, or a pair (latent columns, rope columns)"
        )
    latent, rope = q
    check_query("q[0]", latent, D_V, plan)
    check_query("q[1]", rope, D_QK - D_V, plan)
    if rope.dtype != latent.dtype:
        raise InvalidArgument(f"q[1] is {describe(rope)}, q[0] {describe(latent)}; accepted: the same dtype")
    return latent, rope


def check_query(name: str, q: torch.Tensor, width: int, plan: DecodePlan) -> None:
    expected = plan.query_shape
    if q.dim() != len(expected) + 1 or q.shape[-1] != width:
        dimensions = "B, S_q" if plan.query_offsets is None else "T"
        raise InvalidArgument(f"{name} is {describe(q)}; accepted: [{dimensions}, H_q, {width}]")
    if tuple(q.shape[:-1]) != expected:
        raise InvalidArgument(
            f"{name} is {describe(q)}, the plan was made for other shapes; accepted: {[*expected, width]}"
        )
    if q.device != plan.seq_lens.device:
        raise InvalidArgument(f"{name} is on {q.device}, the plan on {plan.seq_lens.device}; accepted: the same device")
    dtypes = DTYPES[path_of(q.device)]
    if q.dtype not in dtypes:
        accepted = ", ".join(str(d).removeprefix("torch.") for d in dtypes)
        raise InvalidArgument(f"{name} is {describe(q)}; accepted: {accepted}")
    if q.stride(-1) != 1:
        raise InvalidArgument(f"{name} has strides {tuple(q.stride())}; accepted: a contiguous last dimension")
    if q.requires_grad and torch.is_grad_enabled():
        raise InvalidArgument(
            f"{name} requires a gradient, and decoding has no backward; accepted: a call under torch.inference_mode() "
            "or torch.no_grad(), or q.detach()"
        )


def check_softmax_scale(softmax_scale: float) -> None:
    if isinstance(softmax_scale, bool) or not isinstance(softmax_scale, (int, float)):
        raise InvalidArgument(
            f"softmax_scale is {softmax_scale!r} of type {type(softmax_scale).__name__}; accepted: a Python float"
        )
    if not (math.isfinite(softmax_scale) and softmax_scale > 0):
        raise InvalidArgument(f"softmax_scale is {softmax_scale}; accepted: a finite number greater than 0")


def check_heads(h_q: int, h_kv: int) -> None:
    check_positive_int("h_q", h_q)
    check_positive_int("h_kv", h_kv)
    if h_q % h_kv:
        raise InvalidArgument(f"h_q is {h_q}, h_kv {h_kv}; accepted: h_q a multiple of h_kv")


def check_positive_int(name: str, value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise InvalidArgument(f"{name} is {value!r}; accepted: an integer of at least 1")
