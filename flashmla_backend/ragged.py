"""Steps whose requests differ in their numbers of query tokens: verified drafts, short prompts beside decodes.

A request is cut into *query tiles*: as many neighbouring query tokens as fill a tile of query rows, the last one what
is left. To the scheduler and the kernels a query tile is a request. It sees the cache up to its own last token, through
the request's row of the block table. So no row tile is idle where others have more query tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from flashmla_backend import bounds
from flashmla_backend.api import check_heads, check_positive_int, checked_lengths, new_schedule
from flashmla_backend.dispatch import default_num_sms, path_of
from flashmla_backend.errors import InvalidArgument, Unsupported
from flashmla_backend.paging import check_block_table, describe
from flashmla_backend.plan import DecodePlan
from flashmla_backend.schedule import TILE_ROWS

MOST_TILES = 8192  # FLASHMLA_SCHEDULE_MAX_BATCH


def plan_ragged_decode(
    seq_lens: torch.Tensor,
    block_table: torch.Tensor,
    query_offsets: torch.Tensor,
    *,
    h_q: int,
    h_kv: int = 1,
    page_size: int = 64,
    causal: bool = True,
    num_sms: int | None = None,
    workspace: torch.Tensor | None = None,
    num_pages: int | None = None,
) -> DecodePlan:
    """Schedule one step of requests with different numbers of query tokens; every layer shares the plan.

    Lengths and table are copied into the plan, which follows no later change of them: not for CUDA graphs.

    Args:
        query_offsets: [B + 1] int32 on the CPU, from 0 on: those of request b are tokens query_offsets[b] ..
            query_offsets[b + 1] - 1 of q [T, H_q, 576], T = query_offsets[B]; it may have none.
        others: as in `plan_decode`.

    Returns:
        A plan for `mla_decode`, which then takes q, or the two of a pair, as [T, H_q, ...] and returns out
        [T, H_q, 512] and lse [T, H_q].

    Raises:
        InvalidArgument, OutOfBounds: as `plan_decode`.
        Unsupported: nothing installed has kernels for the tensors' device, or only FlashInfer has.
    """
    check_heads(h_q, h_kv)
    check_block_table(block_table, seq_lens, page_size)
    check_query_offsets(query_offsets, seq_lens.shape[0])
    device = seq_lens.device
    if path_of(device) == "flashinfer":
        raise Unsupported(
            f"query_offsets was given: FlashInfer serves {device}, through which all requests of a step have the same "
            "number of query tokens; plan those with the same number together, by plan_decode"
        )
    num_sms = default_num_sms(device) if num_sms is None else num_sms
    check_positive_int("num_sms", num_sms)
    checked = bounds.new_bounds(seq_lens, num_pages)
    planned_lens = checked_lengths(seq_lens, block_table, page_size, checked)
    s_q = queries_per_tile(query_offsets, h_q // h_kv)
    tiles = QueryTiles.of(query_offsets, s_q)
    request = tiles.request.to(device, non_blocking=True)
    tile_lens = planned_lens[request]
    if causal:
        tile_lens -= tiles.behind.to(device, non_blocking=True)
    tile_lens.clamp_(min=0)
    return DecodePlan(
        tile_lens,
        block_table[request],
        *new_schedule(tile_lens, s_q * h_q, h_kv, num_sms, workspace),
        s_q=s_q,
        h_q=h_q,
        h_kv=h_kv,
        page_size=page_size,
        causal=causal,
        bounds=checked,
        query_offsets=tiles.offsets.to(device, non_blocking=True),
        num_queries=int(query_offsets[-1]),
    )


def queries_per_tile(query_offsets: torch.Tensor, group: int) -> int:
    """Most query tokens of a tile: what fills a row tile, but no more than a request has; and more in a step of more
    tiles than the scheduler takes.

    query_offsets: [B + 1] int32 on the CPU. group: query heads of a KV head.
    """
    counts = query_offsets.diff()
    most = int(counts.max()) if counts.numel() else 1
    queries = max(1, min(most, TILE_ROWS // group))
    while int(tiles_of(counts, queries).sum()) > MOST_TILES:
        queries *= 2
    return queries


def tiles_of(counts: torch.Tensor, s_q: int) -> torch.Tensor:
    return (counts + s_q - 1) // s_q


@dataclass(frozen=True)
class QueryTiles:
    """The query tiles of a step, request after request, on the CPU and, beside a GPU, in memory that it can read."""

    request: torch.Tensor  # [V] int32, whose they are
    behind: torch.Tensor  # [V] int32, query tokens of the request after the tile
    offsets: torch.Tensor  # [V + 1] int32, their query tokens among those of the step

    @staticmethod
    def of(query_offsets: torch.Tensor, s_q: int) -> QueryTiles:
        """query_offsets: [B + 1] int32 on the CPU. s_q: most query tokens of a tile."""
        counts = tiles_of(query_offsets.diff(), s_q)  # [B]
        request = torch.arange(len(counts), dtype=torch.int32).repeat_interleave(counts)
        number = torch.arange(len(request), dtype=torch.int32) - (counts.cumsum(0) - counts).int()[request]
        ends = query_offsets[1:][request]
        offsets = torch.cat([query_offsets[:-1][request] + number * s_q, query_offsets[-1:]])
        behind = (ends - offsets[:-1] - s_q).clamp_(min=0)
        pinned = torch.cuda.is_available()  # or the copy to the device would wait for it
        return QueryTiles(*(x.pin_memory() if pinned else x for x in (request, behind, offsets)))


def check_query_offsets(query_offsets: torch.Tensor, batch: int) -> None:
    if tuple(query_offsets.shape) != (batch + 1,) or query_offsets.dtype != torch.int32:
        raise InvalidArgument(
            f"query_offsets is {describe(query_offsets)} for {batch} requests; accepted: [{batch + 1}] int32"
        )
    if query_offsets.device.type != "cpu":
        raise InvalidArgument(f"query_offsets is on {query_offsets.device}; accepted: the CPU, where steps are planned")
    if int(query_offsets[0]) != 0 or bool((query_offsets.diff() < 0).any()):
        raise InvalidArgument(
            f"query_offsets is {query_offsets.tolist()}; accepted: from 0 on, no offset less than the one before"
        )
