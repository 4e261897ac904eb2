"""What kit_on_gpu.py holds draft runners to."""

from __future__ import annotations

import pytest
import torch

from .draft_logits import check_drafts

LOGITS = torch.tensor([[[0.5, 0.496, 0.1]], [[0.1, 0.2, 0.9]]])  # [2 steps, 1 request, 3 tokens]; the first tie nearly
TOKENS = torch.tensor([[2, 0, 2]])


def test_a_near_tie_may_go_either_way_and_ends_the_comparison() -> None:
    other = torch.tensor([[[0.496, 0.5, 0.1]], [[0.9, 0.2, 0.1]]])
    check_drafts(other, LOGITS, torch.tensor([[2, 1, 0]]), TOKENS)


@pytest.mark.parametrize("step", [0, 1])
def test_an_error_that_leaves_the_tokens_alone_is_found(step: int) -> None:
    wrong = LOGITS.clone()
    wrong[step, 0, 1] -= 0.03
    with pytest.raises(AssertionError, match=f"request 0, step {step}"):
        check_drafts(wrong, LOGITS, TOKENS, TOKENS)


@pytest.mark.parametrize("tokens", [[[1, 0, 2]], [[2, 1, 2]]], ids=["given", "drafted"])
def test_a_token_that_is_not_the_logits_is_found(tokens: list[list[int]]) -> None:
    with pytest.raises(AssertionError):
        check_drafts(LOGITS, LOGITS, torch.tensor(tokens), TOKENS)


def test_a_graph_that_leaves_no_logits_is_found() -> None:
    with pytest.raises(AssertionError, match="no logits"):
        check_drafts(torch.zeros_like(LOGITS), torch.zeros_like(LOGITS), TOKENS, TOKENS)
