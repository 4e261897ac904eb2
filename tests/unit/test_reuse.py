"""plan_decode(reuse=..., workspace=...): the next step's schedule in the buffers of an earlier plan, shared scratch."""

from __future__ import annotations

import pytest
import torch

import flashmla_backend
from flashmla_backend import InvalidArgument, api, reference
from flashmla_backend import workspace as workspaces
from tests.conftest import check_close, make_problem

SHAPE = {"s_q": 1, "h_q": 8, "num_sms": 5}


def test_the_buffers_stay_and_hold_the_new_schedule() -> None:
    first, second = make_problem([1000, 3, 0], h_q=8), make_problem([5, 64, 4000], h_q=8)
    plan = flashmla_backend.plan_decode(first.seq_lens, first.block_table, **SHAPE)
    addresses = [t.data_ptr() for t in (plan.items, plan.part_offsets, plan.split_offsets)]
    reused = flashmla_backend.plan_decode(second.seq_lens, second.block_table, **SHAPE, reuse=plan)
    fresh = flashmla_backend.plan_decode(second.seq_lens, second.block_table, **SHAPE)
    assert [t.data_ptr() for t in (reused.items, reused.part_offsets, reused.split_offsets)] == addresses
    assert reused.partial_out is plan.partial_out and reused.partial_lse is plan.partial_lse
    for name in ("items", "part_offsets", "split_offsets"):
        assert torch.equal(getattr(reused, name), getattr(fresh, name))
    out, lse = flashmla_backend.mla_decode(second.q, second.kv_cache, reused, softmax_scale=0.05)
    expected = reference.mla_decode(second.q, second.kv_cache, second.block_table, second.seq_lens, softmax_scale=0.05)
    check_close(out, lse, *expected)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"h_q": 16}, "'h_q': 8"),
        ({"s_q": 2}, "'s_q': 1"),
        ({"num_sms": 6}, "'parts': 5"),
        ({"causal": False}, "'causal': True"),
    ],
)
def test_other_shapes_are_refused(changes: dict, message: str) -> None:
    problem = make_problem([1000, 3, 0], h_q=8)
    plan = flashmla_backend.plan_decode(problem.seq_lens, problem.block_table, **SHAPE)
    with pytest.raises(InvalidArgument, match=f"reuse was made for .*{message}"):
        flashmla_backend.plan_decode(problem.seq_lens, problem.block_table, **(SHAPE | changes), reuse=plan)


def test_a_larger_batch_is_refused() -> None:
    problem = make_problem([1000, 3, 0], h_q=8)
    plan = flashmla_backend.plan_decode(problem.seq_lens[:2], problem.block_table[:2], **SHAPE)
    with pytest.raises(InvalidArgument, match=r"reuse was made for 2 requests.*accepted for this step: 3 or more"):
        flashmla_backend.plan_decode(problem.seq_lens, problem.block_table, **SHAPE, reuse=plan)


def test_smaller_batches_share_the_buffers_of_the_largest() -> None:
    largest = make_problem([70] * 40, h_q=8)
    plan = flashmla_backend.plan_decode(largest.seq_lens, largest.block_table, **SHAPE)
    for lengths in ([3000, 1], [5], [64] * 39, [70] * 40):
        problem = make_problem(lengths, h_q=8)
        reused = flashmla_backend.plan_decode(problem.seq_lens, problem.block_table, **SHAPE, reuse=plan)
        fresh = flashmla_backend.plan_decode(problem.seq_lens, problem.block_table, **SHAPE)
        for name in ("items", "part_offsets", "split_offsets"):
            assert getattr(reused, name).data_ptr() == getattr(plan, name).data_ptr()
            assert torch.equal(getattr(reused, name), getattr(fresh, name))
        assert str(reused) == str(fresh)
        out, lse = flashmla_backend.mla_decode(problem.q, problem.kv_cache, reused, softmax_scale=0.05)
        tensors = problem.q, problem.kv_cache, problem.block_table, problem.seq_lens
        check_close(out, lse, *reference.mla_decode(*tensors, softmax_scale=0.05))


def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (api, workspaces):
        monkeypatch.setattr(module, "path_of", lambda device: "sm90")


@pytest.mark.parametrize("s_q, h_q, h_kv", [(1, 16, 1), (1, 128, 1), (5, 128, 1), (2, 20, 2), (8, 8, 8)])
def test_plans_take_what_workspace_size_says(s_q: int, h_q: int, h_kv: int, monkeypatch: pytest.MonkeyPatch) -> None:
    hopper(monkeypatch)
    problem = make_problem([70, 3], s_q=s_q, h_q=h_q, h_kv=h_kv)
    shape = {"s_q": s_q, "h_q": h_q, "h_kv": h_kv, "num_sms": 11}
    size = workspaces.workspace_size(torch.device("cpu"), **shape)
    workspace = torch.empty(size + 5)
    plan = flashmla_backend.plan_decode(problem.seq_lens, problem.block_table, **shape, workspace=workspace)
    alone = flashmla_backend.plan_decode(problem.seq_lens, problem.block_table, **shape)
    for ours, theirs in ((plan.partial_out, alone.partial_out), (plan.partial_lse, alone.partial_lse)):
        assert ours.shape == theirs.shape and ours.is_contiguous()
    assert plan.partial_out.numel() + plan.partial_lse.numel() == size
    assert plan.partial_out.data_ptr() == workspace.data_ptr()
    assert plan.partial_lse.data_ptr() == workspace.data_ptr() + plan.partial_out.nbytes
    with pytest.raises(InvalidArgument, match=rf"workspace is \[{size - 1}\] float32; accepted: \[{size}\] float32"):
        flashmla_backend.plan_decode(problem.seq_lens, problem.block_table, **shape, workspace=workspace[: size - 1])


def test_the_cpu_takes_no_workspace() -> None:
    assert workspaces.workspace_size(torch.device("cpu"), s_q=1, h_q=128) == 0


def test_a_reused_plan_keeps_its_workspace() -> None:
    problem = make_problem([70, 3], h_q=8)
    plan = flashmla_backend.plan_decode(problem.seq_lens, problem.block_table, **SHAPE)
    with pytest.raises(InvalidArgument, match="workspace and reuse were both given"):
        flashmla_backend.plan_decode(
            problem.seq_lens, problem.block_table, **SHAPE, reuse=plan, workspace=torch.empty(0)
        )
