"""SGLang's kit runs its draft model step by step and from a CUDA graph, and compares tokens; here their logits are.

Between logits that nearly tie a rounding chooses the token, which depends on the rows of a matmul, hence on a graph's
padding; and an error too small to move the largest logit leaves every token as it is.
"""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial
from itertools import cycle
from typing import Any
from unittest.mock import patch

import torch
from sglang.test.kits.attention_unittest.runner_modes import speculative_draft_runner as kit

ABSOLUTE, RELATIVE = 8e-3, 2**-7  # roundings of 16 bits; a token too few moves logits by 2e-2 and more


class RecordedForward:
    """The kit's draft model; a replayed graph, too, leaves each step's logits in `logits` [steps, rows, vocabulary]."""

    def __init__(self, forward: Any, settings: Any) -> None:
        self.forward = forward
        steps = settings.speculative_num_steps - 1  # the first token is given
        self._step = cycle(range(steps))
        self.logits = torch.zeros(
            steps, settings.capture_batch_size, settings.vocab_size, dtype=torch.float32, device=settings.device
        )

    def __call__(self, batch: Any) -> Any:
        out = self.forward(batch)
        logits = out.logits_output.next_token_logits.detach()
        self.logits[next(self._step), : len(logits)].copy_(logits)
        return out


def run_draft_runner_case(test: Any, case: Any, **shape: Any) -> None:
    """kit.run_mla_eagle_draft_cuda_graph_runner_case with logits compared.

    Pages lie in order: the kit enters drafts into the token table as if they did, which would leave pages whose tokens
    are in two places. No allocator makes those, and who reads by the page reads none of the drafts.
    """
    runs: list[RecordedForward] = []
    make_forward = kit._make_mla_model_forward

    def recorded(fixture: Any, settings: Any) -> RecordedForward:
        runs.append(RecordedForward(make_forward(fixture, settings), settings))
        return runs[-1]

    def check(actual: Any, expected: Any, settings: Any) -> None:
        eager, graph = runs
        check_drafts(graph.logits, eager.logits, actual[2], expected[2])

    in_order = partial(kit.build_mla_attention_fixture, loc_layout="contiguous")
    adapter = partial(kit.EagleDraftCudaGraphRunnerAdapter, assert_outputs_close=check)
    with ExitStack() as patches:
        patches.enter_context(patch.object(kit, "_make_mla_model_forward", recorded))
        patches.enter_context(patch.object(kit, "build_mla_attention_fixture", in_order))
        patches.enter_context(patch.object(kit, "EagleDraftCudaGraphRunnerAdapter", adapter))
        kit.run_mla_eagle_draft_cuda_graph_runner_case(test, case, topk=1, **shape)


def check_drafts(
    logits: torch.Tensor, expected_logits: torch.Tensor, tokens: torch.Tensor, expected_tokens: torch.Tensor
) -> None:
    """logits: [steps, rows, vocabulary], of which the first are the requests'; tokens: [requests, 1 + steps].

    Raises AssertionError if the logits of a step differ that both runs took with the same tokens.
    """
    torch.testing.assert_close(tokens[:, 0], expected_tokens[:, 0])
    for request, (drafts, expected_drafts) in enumerate(zip(tokens.tolist(), expected_tokens.tolist(), strict=True)):
        for step in range(len(logits)):
            where = f"request {request}, step {step}, tokens {drafts} for {expected_drafts}: "
            ours, expected = logits[step, request], expected_logits[step, request]
            torch.testing.assert_close(
                ours, expected, atol=ABSOLUTE, rtol=RELATIVE, msg=lambda text, where=where: where + text
            )
            assert bool(expected.any()), "the run left no logits"
            assert drafts[step + 1] == int(ours.argmax()), f"{where}not the largest logit's"
            if drafts[step + 1] != expected_drafts[step + 1]:  # nearly tied, as the logits are close
                break
