"""One decode step as data."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch

from flashmla_backend.bounds import Bounds
from flashmla_backend.flashinfer_path import FlashInferPlan
from flashmla_backend.schedule import max_items

Buffers = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


@dataclass(frozen=True, eq=False)
class DecodePlan:
    """One decode step as data: who reads which pages. Made by `plan_decode`, read by every layer's `mla_decode`."""

    seq_lens: torch.Tensor  # [B] int32
    block_table: torch.Tensor  # [B, W] int32
    items: torch.Tensor  # [max_items, 4] int32: request, page_begin, page_end, split; unused rows are -1
    part_offsets: torch.Tensor  # [parts + 1] int32: part p runs items[part_offsets[p] : part_offsets[p + 1]]
    split_offsets: torch.Tensor  # [B + 1] int32: where each cut request's partial results lie
    partial_out: torch.Tensor  # [max_splits, H_kv, rows, 256] pairs of fp16, workspace of the layers; empty on the CPU
    partial_lse: torch.Tensor  # [max_splits, H_kv, rows, 2] fp32, in batch-invariant mode [.., 4]
    rooms: torch.Tensor  # fp32 vector, scratch of the thread blocks in batch-invariant mode, else empty
    s_q: int
    h_q: int
    h_kv: int
    page_size: int
    causal: bool
    num_sms: int = 0  # thread blocks that run at once, as it was planned for
    max_leaves: int = 0  # of a request in batch-invariant mode, 0 in free mode
    flashinfer: FlashInferPlan | None = None  # on GPUs that FlashInfer serves; no work items there
    bounds: Bounds | None = None  # with FLASHMLA_CHECK_BOUNDS=1
    # [B + 1] int32, of a ragged step, in which query tiles stand for requests: see `plan_ragged_decode`. s_q is then
    # the most query tokens of a tile, num_queries those of all.
    query_offsets: torch.Tensor | None = None
    num_queries: int = 0

    @property
    def batch(self) -> int:
        return self.seq_lens.shape[0]

    @property
    def query_shape(self) -> tuple[int, ...]:
        """Of q without its columns."""
        return (self.batch, self.s_q, self.h_q) if self.query_offsets is None else (self.num_queries, self.h_q)

    def of_step(self, seq_lens: torch.Tensor, block_table: torch.Tensor, num_pages: int | None) -> DecodePlan:
        """The same buffers for a step of as many requests or fewer, yet to be planned."""
        if seq_lens is self.seq_lens and block_table is self.block_table and self.bounds is None:
            return self
        batch = seq_lens.shape[0]
        made = object.__new__(DecodePlan)  # dataclasses.replace takes longer than all the rest of a step's planning
        made.__dict__.update(self.__dict__, seq_lens=seq_lens, block_table=block_table)
        if batch != self.batch:
            items = self.items[: max_items(batch, self.part_offsets.shape[0] - 1)]
            made.__dict__.update(items=items, split_offsets=self.split_offsets[: batch + 1])
        if self.bounds is not None:
            made.__dict__.update(bounds=self.bounds.of_step(batch, num_pages))
        return made

    def check(self) -> None:
        """Raise OutOfBounds if the device has met a fault, of this plan or another, since the last look.

        `plan_decode` looks too. Neither waits for the device: synchronize first to hear of the work enqueued so far.
        Without FLASHMLA_CHECK_BOUNDS=1 there is nothing to find.
        """
        if self.bounds is not None:
            self.bounds.faults.raise_first()

    @property
    def batch_invariant(self) -> bool:
        return self.max_leaves > 0

    def __str__(self) -> str:
        if self.flashinfer is not None:
            return f"{self.batch} requests, {self.s_q} query tokens, {self.h_q} heads, planned by FlashInfer"
        offsets = self.part_offsets.tolist()
        queries = f"{self.batch} requests, {self.s_q} query tokens"
        if self.query_offsets is not None:
            queries = f"{self.batch} query tiles, {self.num_queries} query tokens"
        lines = [
            f"{queries}, {self.h_q} heads over {self.h_kv} KV heads, pages of "
            f"{self.page_size}, {'causal' if self.causal else 'no mask'}: {offsets[-1]} work items on "
            f"{len(offsets) - 1} parts, {int(self.split_offsets[-1])} partial results"
        ]
        for part, (first, last) in enumerate(pairwise(offsets)):
            work = ", ".join(
                f"request {r} pages {a}-{b}" + (f" -> split {s}" if s >= 0 else "")
                for r, a, b, s in self.items[first:last].tolist()
            )
            lines.append(f"  part {part}: {work or 'idle'}")
        return "\n".join(lines)
