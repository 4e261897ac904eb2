"""Plans of an engine's steps, in buffers that stay where they are, as captured CUDA graphs require."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from flashmla_backend.api import DecodePlan, plan_decode, workspace_size
from flashmla_backend.dispatch import default_num_sms

from .claim import asked_for_batch_invariance


class StepPlanner:
    """Keeps one plan per shape of batch and rewrites it each step; all share one workspace for partial results.

    device: of the lengths and block tables.
    h_q: query heads.
    page_size: tokens per page of the cache.
    longest_query: most new tokens of a request in a step.
    batch_invariant: as in `plan_decode`; FLASHMLA_BACKEND_BATCH_INVARIANT=1 asks for it too.
    """

    def __init__(
        self, device: torch.device, *, h_q: int, page_size: int, longest_query: int, batch_invariant: bool = False
    ):
        num_sms = default_num_sms(device)
        self.batch_invariant = batch_invariant or asked_for_batch_invariance()
        sizes = [
            workspace_size(device, s_q=s_q, h_q=h_q, num_sms=num_sms, batch_invariant=self.batch_invariant)
            for s_q in range(1, longest_query + 1)
        ]
        self.workspace = torch.empty(max(sizes), dtype=torch.float32, device=device)
        self._plan_decode = partial(
            plan_decode, h_q=h_q, page_size=page_size, num_sms=num_sms, batch_invariant=self.batch_invariant
        )
        self._plans: dict[tuple[int, int], DecodePlan] = {}

    def step(self, seq_lens: torch.Tensor, block_table: torch.Tensor, s_q: int) -> Callable[[], DecodePlan]:
        """What plans a step, arguments as in `plan_decode`: call it once, before the first layer or captured with it.

        Only the first step of a shape allocates, here. The plan holds until the next step of that shape is planned.
        """
        shape = (seq_lens.shape[0], s_q)
        plan = self._plans.get(shape)
        if plan is None:
            plan = self._plans[shape] = self._plan_decode(seq_lens, block_table, s_q=s_q, workspace=self.workspace)
        return partial(self._plan_decode, seq_lens, block_table, s_q=s_q, reuse=plan)
