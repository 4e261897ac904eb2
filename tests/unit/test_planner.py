"""The engines' planner: one plan a shape of batch, one workspace for all of them."""

from __future__ import annotations

import pytest
import torch

from flashmla_backend import api, dispatch, plan_decode, ragged, workspace
from flashmla_backend.integration.claim import BATCH_INVARIANT_VARIABLE
from flashmla_backend.integration.planner import StepPlanner
from tests.conftest import make_problem

CPU = torch.device("cpu")


def test_a_shape_keeps_its_buffers_and_holds_the_newest_step() -> None:
    planner = StepPlanner(CPU, h_q=16, page_size=128, longest_query=2)
    first, second = (make_problem(lengths, page_size=128) for lengths in ([3000, 5, 0], [64, 700, 1]))
    earlier = planner.step(first.seq_lens, first.block_table, 1)()
    later = planner.step(second.seq_lens, second.block_table, 1)()
    fresh = plan_decode(second.seq_lens, second.block_table, s_q=1, h_q=16, page_size=128)
    assert later.seq_lens is second.seq_lens and later.block_table is second.block_table
    for name in ("items", "part_offsets", "split_offsets"):
        assert getattr(later, name).data_ptr() == getattr(earlier, name).data_ptr()
        assert torch.equal(getattr(later, name), getattr(fresh, name))
    assert (later.h_q, later.page_size, later.s_q, later.causal) == (16, 128, 1, True)


def test_nothing_is_allocated_after_the_first_step_of_a_shape() -> None:
    """What is captured only rewrites the schedule: `step` returns it unplanned, also the first time."""
    planner = StepPlanner(CPU, h_q=16, page_size=64, longest_query=1)
    problem = make_problem([3000, 5])
    plan_step = planner.step(problem.seq_lens, problem.block_table, 1)
    items = plan_step().items
    problem.seq_lens.copy_(torch.tensor([64, 1]))
    replayed = plan_step()
    assert replayed.items.data_ptr() == items.data_ptr()
    assert replayed.items[replayed.items[:, 0] >= 0][:, 2].tolist() == [1, 1]  # one page each


def test_batches_and_query_lengths_have_plans_of_their_own() -> None:
    planner = StepPlanner(CPU, h_q=16, page_size=64, longest_query=3)
    problem = make_problem([300, 5, 64, 65])
    steps = [(batch, s_q) for batch in (1, 3, 4) for s_q in (1, 2, 3)]
    plans = [planner.step(problem.seq_lens[:batch], problem.block_table[:batch], s_q)() for batch, s_q in steps]
    assert [(plan.batch, plan.s_q) for plan in plans] == steps
    assert len({plan.items.data_ptr() for plan in plans}) == len(plans)
    for plan, (batch, s_q) in zip(plans, steps, strict=True):
        fresh = plan_decode(problem.seq_lens[:batch], problem.block_table[:batch], s_q=s_q, h_q=16)
        assert str(plan) == str(fresh)


@pytest.mark.parametrize("longest_query", [1, 2, 5])
def test_the_workspace_is_what_the_greediest_query_length_takes(
    longest_query: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (api, workspace):
        monkeypatch.setattr(module, "path_of", lambda device: "sm90")
    sizes = {}

    def workspace_size(device: torch.device, *, s_q: int, h_q: int, num_sms: int, batch_invariant: bool) -> int:
        assert (h_q, num_sms, batch_invariant) == (20, dispatch.default_num_sms(CPU), False)
        sizes[s_q] = workspace.workspace_size(device, s_q=s_q, h_q=h_q, num_sms=num_sms)
        return sizes[s_q]

    monkeypatch.setattr("flashmla_backend.integration.planner.workspace_size", workspace_size)
    planner = StepPlanner(CPU, h_q=20, page_size=64, longest_query=longest_query)
    assert sorted(sizes) == list(range(1, longest_query + 1))
    assert planner.workspace.shape == (max(sizes.values()),) and planner.workspace.dtype == torch.float32
    problem = make_problem([300, 5], h_q=20)
    for s_q in range(1, longest_query + 1):
        plan = planner.step(problem.seq_lens, problem.block_table, s_q)()
        assert plan.partial_out.data_ptr() == planner.workspace.data_ptr()
    longer = planner.step(problem.seq_lens, problem.block_table, longest_query + 10)()
    assert longer.partial_out.untyped_storage().data_ptr() != planner.workspace.untyped_storage().data_ptr()


@pytest.mark.parametrize("most, shared", [(1, True), (2, True), (3, True), (4, False), (70, False)])
def test_ragged_steps_take_the_workspace_if_it_is_made_for_them(
    most: int, shared: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (api, ragged, workspace):
        monkeypatch.setattr(module, "path_of", lambda device: "sm90")
    planner = StepPlanner(CPU, h_q=16, page_size=64, longest_query=3)
    problem = make_problem([300, 5])
    offsets = torch.tensor([0, most, most + 1], dtype=torch.int32)
    plan = planner.ragged_step(problem.seq_lens, problem.block_table, offsets)()
    assert (plan.partial_out.data_ptr() == planner.workspace.data_ptr()) is shared
    assert (plan.num_queries, plan.s_q, plan.h_q, plan.page_size) == (most + 1, min(most, 4), 16, 64)


def test_faults_of_a_replayed_graph_are_told_by_the_next_step(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The host hears of them without planning anything."""
    monkeypatch.setenv("FLASHMLA_CHECK_BOUNDS", "1")
    problem = make_problem([300, 5])
    planner = StepPlanner(CPU, h_q=16, page_size=64, longest_query=1)
    replay = planner.step(problem.seq_lens, problem.block_table, 1)
    problem.block_table[0, 1] = -1
    replay(num_pages=problem.kv_cache.shape[0])
    assert not caplog.records
    planner.step(problem.seq_lens, problem.block_table, 1)
    (record,) = caplog.records
    assert "block_table[0, 1] was -1" in record.getMessage()


@pytest.mark.parametrize("argument", [False, True])
@pytest.mark.parametrize("variable", ["", "0", "1"])
def test_batch_invariance_comes_from_the_engine_or_from_our_variable(
    argument: bool, variable: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(BATCH_INVARIANT_VARIABLE, variable)
    planner = StepPlanner(CPU, h_q=16, page_size=64, longest_query=1, batch_invariant=argument)
    problem = make_problem([300, 5])
    plan = planner.step(problem.seq_lens, problem.block_table, 1)()
    assert plan.batch_invariant == (argument or variable == "1")


def test_a_checked_step_says_how_many_pages_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLASHMLA_CHECK_BOUNDS", "1")
    problem = make_problem([300, 5])
    planner = StepPlanner(CPU, h_q=16, page_size=64, longest_query=1)
    pages = problem.kv_cache.shape[0]
    plan = planner.step(problem.seq_lens, problem.block_table, 1)(num_pages=pages)
    assert plan.bounds is not None and plan.bounds.num_pages == pages
    assert plan.bounds.planned_lens.tolist() == [300, 5]
