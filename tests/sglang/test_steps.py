"""SGLang's token table becomes block tables, in buffers that stay where they are."""

from __future__ import annotations

import logging

import pytest
import torch

from flashmla_backend import DecodePlan, api, bounds, plan_decode
from flashmla_backend.errors import InvalidArgument
from flashmla_backend.integration.planner import StepPlanner
from flashmla_backend.integration.sglang.dcp import WHOLE, Share
from flashmla_backend.integration.sglang.steps import StepBuffers, run_tokens

CONTEXT = 300  # no multiple of 64: the last tile of a row is cut short
HEADS = 16
PAGES = 400  # of the cache


def step_buffers(
    table: torch.Tensor, rows: int, num_pages: int = PAGES, page_size: int = 64, share: Share = WHOLE
) -> StepBuffers:
    logger = logging.getLogger("flashmla_backend.sglang")
    planner = StepPlanner(table.device, h_q=HEADS, page_size=page_size, longest_query=2, logger=logger)
    return StepBuffers(table, rows, planner, num_pages, share)


def token_table(lengths: list[int], page_size: int) -> torch.Tensor:
    """[requests, CONTEXT] int32 as SGLang fills it: shuffled pages, rubbish after a request's last token."""
    generator = torch.Generator().manual_seed(0)
    pages = torch.randperm(100, generator=generator).tolist()
    table = torch.full((len(lengths), CONTEXT), -7, dtype=torch.int32)
    for request, length in enumerate(lengths):
        for token in range(length):
            if token % page_size == 0:
                page = pages.pop()
            table[request, token] = page * page_size + token % page_size
    return table


@pytest.mark.parametrize("page_size, run", [(16, 16), (32, 32), (48, 16), (64, 64), (96, 32), (128, 64), (256, 64)])
def test_pages_are_those_of_the_tokens(page_size: int, run: int) -> None:
    assert run_tokens(page_size) == run
    lengths = [1, 63, 64, 65, 129, 300]
    table = token_table(lengths, page_size)
    requests = torch.tensor([5, 0, 3, 2])
    lens = torch.tensor([lengths[r] for r in requests])
    plan = step_buffers(table, rows=8, page_size=run).plan(requests, lens, added=0, s_q=1)
    assert plan.seq_lens.tolist() == lens.tolist()
    for row, request in enumerate(requests.tolist()):
        tokens = torch.arange(lengths[request])
        slots = plan.block_table[row, tokens // run] * run + tokens % run
        assert slots.tolist() == table[request, : lengths[request]].tolist()


def addresses(plan: DecodePlan) -> list[int]:
    tensors = (plan.seq_lens, plan.block_table, plan.items, plan.part_offsets, plan.split_offsets)
    return [tensor.data_ptr() for tensor in tensors]


def test_plans_of_a_shape_lie_in_the_same_buffers() -> None:
    table = token_table([300, 200, 64], 64)
    buffers = step_buffers(table, rows=4)
    first = {batch: addresses(buffers.plan(torch.arange(batch), torch.full((batch,), 2), 0, 1)) for batch in (1, 2, 3)}
    for requests, lens, added in (([2, 1, 0], [3, 190, 299], 1), ([1], [200], 0), ([0, 1], [299, 64], 1)):
        plan = buffers.plan(torch.tensor(requests), torch.tensor(lens), added=added, s_q=1)
        assert addresses(plan) == first[len(requests)]
        assert plan.seq_lens.tolist() == [length + added for length in lens]
        fresh = plan_decode(plan.seq_lens.clone(), plan.block_table.clone(), s_q=1, h_q=HEADS, num_pages=PAGES)
        assert str(plan) == str(fresh)
    assert buffers.block_table.shape == (4, 5)  # tiles of the longest context


def test_what_was_reserved_is_what_is_planned_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a CUDA graph nothing may be allocated."""
    buffers = step_buffers(token_table([300, 200], 64), rows=4)
    buffers.reserve(2, s_q=2)
    monkeypatch.setattr(api, "make_workspaces", None)
    plan = buffers.plan(torch.tensor([0, 1]), torch.tensor([298, 9]), added=2, s_q=2)
    assert plan.seq_lens.tolist() == [300, 11] and plan.s_q == 2
    with pytest.raises(TypeError):
        buffers.plan(torch.tensor([0]), torch.tensor([298]), added=2, s_q=2)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        ((1, 70, 5), r"req_to_token\[0, 70\] is 5, its page begins at slot"),
        ((1, 0, 65), r"req_to_token\[0, 0\] is 65, .*--page-size 64"),
    ],
)
def test_tokens_that_do_not_lie_together_are_refused(spoil: tuple[int, int, int], message: str) -> None:
    table = token_table([10, 100], 64)
    request, token, slot = spoil
    table[request, token] = slot
    buffers = step_buffers(table, rows=4)
    with pytest.raises(InvalidArgument, match=message):
        buffers.plan(torch.tensor([request]), torch.tensor([100]), added=0, s_q=1)
    buffers.plan(torch.tensor([0]), torch.tensor([10]), added=0, s_q=1)


def test_faults_are_logged_and_the_next_step_goes_on(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv(bounds.VARIABLE, "1")
    table = token_table([100, 64], 64)
    buffers = step_buffers(table, rows=4, num_pages=int(table[1, 0]) // 64)  # one too few for request 1
    requests, lens = torch.tensor([0, 1]), torch.tensor([0, 64])
    plan = buffers.plan(requests, lens, added=0, s_q=1)
    assert plan.bounds is not None and plan.bounds.planned_lens.tolist() == [0, bounds.AT_FAULT]
    with caplog.at_level(logging.ERROR, "flashmla_backend.sglang"):
        buffers.plan(requests[:1], lens[:1], added=0, s_q=1)
        buffers.planner.log_faults()
    (record,) = caplog.records
    assert "block_table[1, 0] was" in record.getMessage()


@pytest.mark.parametrize("page_size", [1, 16, 32])
def test_small_pages_are_noticed_where_they_are_shuffled(page_size: int) -> None:
    buffers = step_buffers(token_table([90], page_size), rows=4)
    with pytest.raises(InvalidArgument, match="pages of 64 consecutive slots"):
        buffers.plan(torch.tensor([0]), torch.tensor([90]), added=0, s_q=1)
