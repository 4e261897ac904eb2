"""The operators as torch sees them: schema, fake functions, torch.compile."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import torch

import flashmla_backend
from flashmla_backend import ops
from tests.conftest import Problem, make_problem


def plan_of(problem: Problem) -> flashmla_backend.DecodePlan:
    return flashmla_backend.plan_decode(problem.seq_lens, problem.block_table, s_q=1, h_q=8, num_sms=4)


def decode_arguments(problem: Problem, plan: flashmla_backend.DecodePlan) -> tuple[Any, ...]:
    """Of ops.mla_decode, without the checks of bounds."""
    return (
        problem.q[..., :512],
        problem.q[..., 512:],
        problem.kv_cache.nan_to_num(),  # opcheck compares inputs before and after; NaN never equals itself
        problem.block_table,
        problem.seq_lens,
        plan.items,
        plan.part_offsets,
        plan.split_offsets,
        plan.partial_out,
        plan.partial_lse,
        plan.rooms,
        0.1,
        True,
        plan.max_leaves,
        plan.s_q,
    )


def test_opcheck_of_the_bounds_checks() -> None:
    problem = make_problem([0, 100, 700], h_q=8)
    planned_lens = torch.empty_like(problem.seq_lens)
    faults = torch.zeros(5, dtype=torch.int32)
    pages = len(problem.kv_cache)
    torch.library.opcheck(ops.check_bounds, (problem.seq_lens, problem.block_table, 64, pages, planned_lens, faults))
    plan = plan_of(problem)
    torch.library.opcheck(ops.mla_decode, (*decode_arguments(problem, plan), None, problem.seq_lens.clone(), faults))


def test_opcheck() -> None:
    problem = make_problem([0, 100, 700], h_q=8)
    plan = plan_of(problem)
    torch.library.opcheck(ops.schedule, (problem.seq_lens, 1, 4, 16))
    buffers = ops.schedule(problem.seq_lens, 1, 4, 16)
    torch.library.opcheck(ops.schedule_into, (problem.seq_lens, 1, 4, 16, False, *buffers))
    torch.library.opcheck(ops.mla_decode, decode_arguments(problem, plan))


def test_layer_compiles_to_one_graph() -> None:
    problem = make_problem([65, 300], h_q=8)
    plan = plan_of(problem)

    def layer(q: torch.Tensor) -> torch.Tensor:
        out, lse = flashmla_backend.mla_decode(q * 2, problem.kv_cache, plan, softmax_scale=0.1)
        return out + lse[..., None].to(out.dtype)

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(problem.q), layer(problem.q))


def test_importing_the_package_loads_neither_torch_nor_engines() -> None:
    code = "import sys, flashmla_backend; print([m for m in ('torch', 'vllm', 'sglang') if m in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"


def test_plan_prints_its_work() -> None:
    text = str(plan_of(make_problem([0, 100, 700], h_q=8)))
    assert "3 requests, 1 query tokens, 8 heads over 1 KV heads, pages of 64, causal" in text
    assert "part 0: " in text and "request 1 pages 0-2" in text and "-> split 0" in text
