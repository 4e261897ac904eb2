"""Once a step: the batch's rows of SGLang's token table become one plan, in buffers that never move.

SGLang keeps, for each request, the cache slot of every token: `req_to_token [requests, context] int32`. Its allocator
hands out whole pages, so with pages of a multiple of 64 tokens the slot of every 64th token names a tile.
"""

from __future__ import annotations

import logging
from functools import partial

import torch

from flashmla_backend import DecodePlan, plan_decode
from flashmla_backend.errors import InvalidArgument
from flashmla_backend.schedule import TILE_TOKENS

from ..planner import outlive
from . import LOGGER_NAME

logger = logging.getLogger(LOGGER_NAME)


class StepBuffers:
    """Lengths, block table and schedules of up to `rows` requests, over a cache of `num_pages` tiles.

    Everything in `plan` is a kernel with shapes that the batch size alone decides, so it may be captured in a CUDA
    graph and then follows SGLang's buffers at every replay.
    """

    def __init__(self, req_to_token: torch.Tensor, rows: int, h_q: int, num_pages: int) -> None:
        device = req_to_token.device
        self.rows, self.h_q, self.num_pages = rows, h_q, num_pages
        self.req_to_token = req_to_token
        self.tile_starts = req_to_token[:, ::TILE_TOKENS]  # [requests, tiles], a view
        self.seq_lens = torch.zeros(rows, dtype=torch.int32, device=device)
        self.block_table = torch.zeros((rows, self.tile_starts.shape[1]), dtype=torch.int32, device=device)
        self._largest: dict[int, DecodePlan] = {}  # by query tokens per request, for all rows

    def reserve(self, s_q: int) -> None:
        """Allocate what plans for `s_q` query tokens per request need; a CUDA graph must not."""
        if s_q not in self._largest:
            nothing = torch.zeros_like(self.seq_lens)
            self._largest[s_q] = self._plan_decode(nothing, self.block_table, s_q)

    def log_faults(self) -> None:
        """Those of earlier steps, since a replayed graph plans without the host."""
        for plan in self._largest.values():
            outlive(logger, plan.check)

    def plan(self, requests: torch.Tensor, seq_lens: torch.Tensor, added: int, s_q: int) -> DecodePlan:
        """One step's plan.

        Args:
            requests: [B] int, rows of the token table.
            seq_lens: [B] int, tokens in the cache of each request as SGLang counts them at this step.
            added: how many more there are by the time that attention runs.
            s_q: query tokens per request.
        """
        self.reserve(s_q)
        batch = requests.shape[0]
        lengths, table = self.seq_lens[:batch], self.block_table[:batch]
        lengths.copy_(seq_lens).add_(added)
        torch.index_select(self.tile_starts, 0, requests, out=table)
        if table.device.type == "cpu":
            check_contiguous(self.req_to_token[requests], lengths)
        table.div_(TILE_TOKENS, rounding_mode="floor")
        return self._plan_decode(lengths, table, s_q, self._largest[s_q])

    def _plan_decode(
        self, seq_lens: torch.Tensor, block_table: torch.Tensor, s_q: int, reuse: DecodePlan | None = None
    ) -> DecodePlan:
        shape = partial(plan_decode, s_q=s_q, h_q=self.h_q, num_pages=self.num_pages)
        return outlive(logger, partial(shape, seq_lens, block_table, reuse=reuse))


def check_contiguous(slots: torch.Tensor, seq_lens: torch.Tensor) -> None:
    """Every tile must be 64 consecutive slots from a multiple of 64, as far as the request has tokens.

    slots: [B, context] int32; seq_lens: [B] int32, both on the CPU.
    """
    position = torch.arange(slots.shape[1])
    start = slots[:, position // TILE_TOKENS * TILE_TOKENS]
    wrong = (slots != start + position % TILE_TOKENS) | (start % TILE_TOKENS != 0)
    wrong &= position < seq_lens[:, None]
    if bool(wrong.any()):
        request, token = wrong.nonzero()[0].tolist()
        raise InvalidArgument(
            f"req_to_token[{request}, {token}] is {int(slots[request, token])}, its tile begins at slot "
            f"{int(start[request, token])}; accepted: tiles of {TILE_TOKENS} consecutive slots from a multiple of "
            f"{TILE_TOKENS}, which SGLang's allocator gives with --page-size {TILE_TOKENS}"
        )
