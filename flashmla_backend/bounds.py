"""FLASHMLA_CHECK_BOUNDS=1: what a decode step is given is checked where it is read, on the device, and nobody waits.

    once a step     lengths fit the block table, and table entries in use are pages of the cache
    in every layer  lengths are still those of the plan, as far as pages go

A request at fault is answered as if it were empty, out 0 and lse -inf, and the others as ever. The first fault is left
in host memory, where the next `plan_decode`, or `DecodePlan.check`, finds it and raises.
"""

from __future__ import annotations

import ctypes
import os
from dataclasses import dataclass
from functools import cache

import torch

from flashmla_backend.errors import InvalidArgument, OutOfBounds
from flashmla_backend.schedule import TILE_TOKENS

VARIABLE = "FLASHMLA_CHECK_BOUNDS"

PAGE, LENGTH, PLAN = 1, 2, 3  # flashmla_fault_kind; 0 is none
AT_FAULT = -1  # in place of a planned length


def enabled() -> bool:
    return os.environ.get(VARIABLE, "") not in ("", "0")


class Faults:
    """Where the kernels of a device leave the first fault since the last look.

    report: `flashmla_fault` in host memory that the device can write: [5] int32 kind, request, column, value, accepted.
    box: what kernels take: on a GPU [2] int64 there, `flashmla_fault_box`; on the CPU the report itself.
    """

    def __init__(self, device: torch.device) -> None:
        on_gpu = device.type == "cuda"
        self.report = torch.zeros(5, dtype=torch.int32, device="cpu", pin_memory=on_gpu)
        address = self.report.data_ptr()
        self.box = torch.tensor([0, address], dtype=torch.int64, device=device) if on_gpu else self.report
        self._fields = (ctypes.c_int32 * 5).from_address(address)  # read once a step: no operator is as fast

    def raise_first(self) -> None:
        """Raise what was found, once, as OutOfBounds. Does not wait for the device."""
        if self._fields[0]:
            fault = tuple(self._fields)
            self._fields[0] = 0
            raise OutOfBounds(describe_fault(*fault))


@cache
def faults_of(device: torch.device) -> Faults:
    """One for all plans of a device, so that whichever step comes next finds what the last one left."""
    return Faults(device)


@dataclass(frozen=True, eq=False)
class Bounds:
    """What a plan keeps for the checks."""

    num_pages: int
    planned_lens: torch.Tensor  # [B] int32, AT_FAULT for requests that are answered as if they were empty
    faults: Faults

    def of_step(self, batch: int, num_pages: int | None) -> Bounds:
        """The same buffers for a step of as many requests or fewer."""
        return Bounds(self.num_pages if num_pages is None else num_pages, self.planned_lens[:batch], self.faults)

    def check_num_pages(self, kv_cache: torch.Tensor) -> None:
        if kv_cache.shape[0] != self.num_pages:
            raise InvalidArgument(
                f"kv_cache has {kv_cache.shape[0]} pages, and the plan's table was checked for num_pages "
                f"{self.num_pages}; accepted: the same number"
            )


def new_bounds(seq_lens: torch.Tensor, num_pages: int | None) -> Bounds | None:
    """What the checks of a new plan need; None unless they are asked for."""
    if not enabled():
        return None
    if num_pages is None or num_pages < 1:
        raise InvalidArgument(
            f"num_pages is {num_pages}, and {VARIABLE}=1 asks for a check of page ids; accepted: the pages of the "
            "cache, kv_cache.shape[0], at least 1. Give it, or unset the variable"
        )
    return Bounds(num_pages, torch.empty_like(seq_lens), faults_of(seq_lens.device))


def describe_fault(kind: int, request: int, column: int, value: int, accepted: int) -> str:
    runs = "tiles" if column == TILE_TOKENS else "pages"
    planned = -(-accepted // column) if kind == PLAN else 0
    found, way_out = {
        PAGE: (
            f"block_table[{request}, {column}] was {value}; accepted: 0 to {accepted - 1}, the pages of the cache",
            "correct the entry",
        ),
        LENGTH: (
            f"seq_lens[{request}] was {value}; accepted: 0 to {accepted} tokens, the width of block_table",
            "correct the length or widen the table",
        ),
        PLAN: (
            f"seq_lens[{request}] was {value} in a layer whose plan was made for {accepted} tokens; accepted: a length "
            f"that takes as many {runs} of {column} tokens as planned, {planned}",
            "call plan_decode again whenever seq_lens changes",
        ),
    }[kind]
    return (
        f"in an earlier step {found}; request {request} was answered as if it were empty (out 0, lse -inf), requests "
        f"within bounds were not affected; {way_out}, and go on with the next step"
    )


def check_on_cpu(
    seq_lens: torch.Tensor,
    block_table: torch.Tensor,
    page_size: int,
    num_pages: int,
    planned_lens: torch.Tensor,
    faults: torch.Tensor,
) -> None:
    """Look at lengths and table, once a step.

    Args:
        seq_lens: [B] int32.
        block_table: [B, W] int32.
        page_size: tokens of a page.
        num_pages: of the cache.
        planned_lens: [B] int32, written: the length, or AT_FAULT.
        faults: `Faults.box`; the first fault goes there unless one is there already.
    """
    width = block_table.shape[1]
    fits = (seq_lens >= 0) & (seq_lens.long() <= width * page_size)
    pages = (seq_lens.long() + page_size - 1) // page_size * fits  # [B]
    wrong = (torch.arange(width) < pages[:, None]) & ((block_table < 0) | (block_table >= num_pages))  # [B, W]
    planned_lens.copy_(seq_lens.masked_fill(~fits | wrong.any(1), AT_FAULT))
    for request in (planned_lens == AT_FAULT).nonzero().flatten().tolist()[:1]:
        if fits[request]:
            column = int(wrong[request].nonzero()[0])
            report_on_cpu(faults, PAGE, request, column, int(block_table[request, column]), num_pages)
        else:
            report_on_cpu(faults, LENGTH, request, 0, int(seq_lens[request]), min(width * page_size, 2**31 - 1))


def planned_on_cpu(
    seq_lens: torch.Tensor, planned_lens: torch.Tensor, page_size: int, faults: torch.Tensor
) -> torch.Tensor:
    """[B] int32, the lengths that a layer follows: 0 for requests at fault, and for those it was not planned for."""
    run = min(page_size, TILE_TOKENS)  # tokens that `check_on_cpu` has looked at together
    runs, planned = ((lens.clamp(min=0).long() + run - 1) // run for lens in (seq_lens, planned_lens))
    rejected = planned_lens == AT_FAULT
    stale = (runs != planned) & ~rejected
    for request in stale.nonzero().flatten().tolist()[:1]:
        report_on_cpu(faults, PLAN, request, run, int(seq_lens[request]), int(planned_lens[request]))
    return seq_lens.masked_fill(stale | rejected, 0).clamp(min=0)


def report_on_cpu(faults: torch.Tensor, *fault: int) -> None:
    if not faults[0]:
        faults.copy_(torch.tensor(fault, dtype=torch.int32))
