"""Plans of an engine's steps, in buffers that stay where they are, as captured CUDA graphs require."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

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
        shared: dict[str, Any] = {
            "h_q": h_q,
            "num_sms": default_num_sms(device),
            "batch_invariant": batch_invariant or asked_for_batch_invariance(),
        }
        sizes = [workspace_size(device, s_q=s_q, **shared) for s_q in range(1, longest_query + 1)]
        self.batch_invariant: bool = shared["batch_invariant"]
        self.workspace = torch.empty(max(sizes), dtype=torch.float32, device=device)
        self._plan_decode = partial(plan_decode, page_size=page_size, **shared)
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
