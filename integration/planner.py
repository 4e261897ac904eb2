"""Plans of an engine's steps, in buffers that stay where they are, as captured CUDA graphs require."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import torch

from flashmla_backend.api import plan_decode, replan
from flashmla_backend.dispatch import default_num_sms
from flashmla_backend.errors import OutOfBounds
from flashmla_backend.plan import DecodePlan
from flashmla_backend.ragged import plan_ragged_decode, queries_per_tile
from flashmla_backend.workspace import workspace_size

from .claim import asked_for_batch_invariance

logger = logging.getLogger(__name__)

Result = TypeVar("Result")


def outlive(logger: logging.Logger, step: Callable[[], Result]) -> Result:
    """What `step` returns, with the faults of earlier steps (FLASHMLA_CHECK_BOUNDS=1) in the log.

    Raised, they would take the engine down, and with it every request that is in order.
    """
    while True:
        try:
            return step()
        except OutOfBounds as fault:  # of an earlier step, told once
            logger.error("%s", fault)


class StepPlanner:
    """Keeps one plan per shape of batch and rewrites it each step; all share one workspace for partial results.

    device: of the lengths and block tables.
    h_q: query heads.
    page_size: tokens per page of the cache.
    longest_query: most new tokens of a request in a step; steps of more have workspaces of their own.
    logger: told of page ids and lengths out of bounds.
    batch_invariant: as in `plan_decode`; FLASHMLA_BACKEND_BATCH_INVARIANT=1 asks for it too.
    """

    def __init__(
        self,
        device: torch.device,
        *,
        h_q: int,
        page_size: int,
        longest_query: int,
        batch_invariant: bool = False,
        logger: logging.Logger = logger,
    ):
        num_sms = default_num_sms(device)
        self.batch_invariant = batch_invariant or asked_for_batch_invariance()
        sizes = [
            workspace_size(device, s_q=s_q, h_q=h_q, num_sms=num_sms, batch_invariant=self.batch_invariant)
            for s_q in range(1, longest_query + 1)
        ]
        self.workspace = torch.empty(max(sizes), dtype=torch.float32, device=device)
        self.h_q = h_q
        self.page_size = page_size
        self.longest_query = longest_query
        self._logger = logger
        self._plan_decode = partial(
            plan_decode, h_q=h_q, page_size=page_size, num_sms=num_sms, batch_invariant=self.batch_invariant
        )
        self._plans: dict[tuple[int, int], DecodePlan] = {}

    def step(self, seq_lens: torch.Tensor, block_table: torch.Tensor, s_q: int) -> Callable[..., DecodePlan]:
        """What plans a step, arguments as in `plan_decode`: call it once, before the first layer or captured with it,
        as `plan_step(num_pages=...)`.

        Only the first step of a shape allocates, here. The plan holds until the next step of that shape is planned.
        """
        shape = (seq_lens.shape[0], s_q)
        plan = self._plans.get(shape)
        if plan is None:
            workspace = self.workspace if s_q <= self.longest_query else None
            # No lengths yet: how many pages there are is known when the plan is asked for.
            first = partial(self._plan_decode, torch.zeros_like(seq_lens), block_table, workspace=workspace)
            plan = self._plans[shape] = outlive(self._logger, partial(first, s_q=s_q, num_pages=1))
        if plan.bounds is not None:
            self.log_faults()  # here too: a replayed graph plans without the host
        return partial(self._outliving, partial(replan, plan, seq_lens, block_table))

    def ragged_step(
        self, seq_lens: torch.Tensor, block_table: torch.Tensor, query_offsets: torch.Tensor
    ) -> Callable[..., DecodePlan]:
        """The same for requests with different numbers of new tokens, arguments as in `plan_ragged_decode`. Its plan is
        a new one each time, not for CUDA graphs. Not in batch-invariant mode."""
        s_q = queries_per_tile(query_offsets, self.h_q)
        plan = partial(
            plan_ragged_decode,
            seq_lens,
            block_table,
            query_offsets,
            h_q=self.h_q,
            page_size=self.page_size,
            workspace=self.workspace if s_q <= self.longest_query else None,
        )
        return partial(self._outliving, plan)

    def log_faults(self) -> None:
        """Those of earlier steps, whatever their shape: one plan speaks for all of the device."""
        if self._plans:
            outlive(self._logger, next(iter(self._plans.values())).check)

    def _outliving(self, plan: Callable[..., DecodePlan], **options: Any) -> DecodePlan:
        return outlive(self._logger, partial(plan, **options))
