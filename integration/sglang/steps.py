"""Once a step: the batch's rows of SGLang's token table become lengths and a block table, in buffers that never move.

SGLang keeps, for each request, the cache slot of every token: `req_to_token [requests, context] int32`. Its allocator
hands out whole pages, so the slot of a page's first token names it. Pages of more than 64 tokens, or of a multiple of
16 that does not divide 64, are taken as several: `run_tokens` of each page lie together. Under DCP the slots of a page
are those of all ranks, so that many times as many lie together.
"""

from __future__ import annotations

import math

import torch

from flashmla_backend import DecodePlan
from flashmla_backend.errors import InvalidArgument
from flashmla_backend.schedule import TILE_TOKENS

from ..planner import StepPlanner
from .dcp import WHOLE, Share


def run_tokens(page_size: int) -> int:
    """Tokens of our pages in a cache whose pages are of `page_size`, a multiple of 16: 16, 32 or 64."""
    return math.gcd(page_size, TILE_TOKENS)


class StepBuffers:
    """Lengths and block table of up to `rows` requests over a cache of `num_pages` of the planner's pages, which holds
    a share of their tokens, and the plans made of them.

    Everything in `plan` is a kernel with shapes that the batch size alone decides, so it may be captured in a CUDA
    graph and then follows SGLang's buffers at every replay.
    """

    def __init__(
        self, req_to_token: torch.Tensor, rows: int, planner: StepPlanner, num_pages: int, share: Share = WHOLE
    ) -> None:
        device = req_to_token.device
        self.rows, self.planner, self.num_pages, self.share = rows, planner, num_pages, share
        self.req_to_token = req_to_token
        self.page_slots = planner.page_size * share.ranks
        self.page_starts = req_to_token[:, :: self.page_slots]  # [requests, pages], a view
        self.seq_lens = torch.zeros(rows, dtype=torch.int32, device=device)
        self.block_table = torch.zeros((rows, self.page_starts.shape[1]), dtype=torch.int32, device=device)

    def reserve(self, batch: int, s_q: int) -> None:
        """Allocate what plans of `batch` requests with `s_q` query tokens each need; a CUDA graph must not."""
        self.planner.step(self.seq_lens[:batch], self.block_table[:batch], s_q)

    def plan(self, requests: torch.Tensor, seq_lens: torch.Tensor, added: int, s_q: int) -> DecodePlan:
        """One step's plan, which holds until the next of as many requests and query tokens.

        Args:
            requests: [B] int, rows of the token table.
            seq_lens: [B] int, tokens in the cache of each request as SGLang counts them at this step.
            added: how many more there are by the time that attention runs.
            s_q: query tokens per request.
        """
        batch = requests.shape[0]
        lengths, table = self.seq_lens[:batch], self.block_table[:batch]
        lengths.copy_(seq_lens).add_(added)
        torch.index_select(self.page_starts, 0, requests, out=table)
        if table.device.type == "cpu":
            check_contiguous(self.req_to_token[requests], lengths, self.page_slots, self.planner.page_size)
        table.div_(self.page_slots, rounding_mode="floor")
        self.share.lengths_(lengths)
        return self.planner.step(lengths, table, s_q)(num_pages=self.num_pages)


def check_contiguous(slots: torch.Tensor, seq_lens: torch.Tensor, page_slots: int, page_size: int) -> None:
    """Every page must be `page_slots` consecutive slots from a multiple of it, as far as the request has tokens.

    slots: [B, context] int32; seq_lens: [B] int32, both on the CPU; page_size: of one rank, for the message.
    """
    position = torch.arange(slots.shape[1])
    start = slots[:, position // page_slots * page_slots]
    wrong = (slots != start + position % page_slots) | (start % page_slots != 0)
    wrong &= position < seq_lens[:, None]
    if bool(wrong.any()):
        request, token = wrong.nonzero()[0].tolist()
        raise InvalidArgument(
            f"req_to_token[{request}, {token}] is {int(slots[request, token])}, its page begins at slot "
            f"{int(start[request, token])}; accepted: pages of {page_slots} consecutive slots from a multiple of "
            f"{page_slots}, which SGLang's allocator gives with --page-size {page_size}"
        )
