"""CUDA graphs: a captured step replayed with other lengths does what eager does; torch.compile sees opaque calls."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

import flashmla_backend
from tests.kernels.problems import SCALE, Problem, capture, fault, make_problem, oracle, plan_of


@pytest.mark.parametrize("h_q, s_q", [(16, 1), (128, 2)])
def test_replay_with_other_lengths(h_q: int, s_q: int, record_property: Callable[[str, object], None]) -> None:
    """Schedule and two layers in one graph; 100 replays, each with new lengths and a new table."""
    record_property("cases", 100)
    source = random.Random(0)
    longest = [5000] * 24
    template = make_problem(longest, s_q=s_q, h_q=h_q)
    persistent = Problem(
        template.q.clone(),
        torch.full_like(template.kv_cache, float("nan")),
        template.block_table.clone(),
        template.seq_lens.clone(),
        template.tokens,
    )
    plan = plan_of(persistent, causal=True)

    def step() -> list[torch.Tensor]:
        step_plan = plan_of(persistent, causal=True, reuse=plan)
        results: list[torch.Tensor] = []
        for _ in range(2):
            results += flashmla_backend.mla_decode(persistent.q, persistent.kv_cache, step_plan, softmax_scale=SCALE)
        return results

    graph, captured = capture(step)
    for replay in range(100):
        lengths = [source.choice([0, source.randint(1, 5000), source.randint(1, 200)]) for _ in longest]
        problem = make_problem(lengths, s_q=s_q, h_q=h_q, seed=replay)
        persistent.q.copy_(problem.q)
        persistent.kv_cache[: len(problem.kv_cache)] = problem.kv_cache
        persistent.block_table.fill_(0)[:, : problem.block_table.shape[1]] = problem.block_table
        persistent.seq_lens.copy_(problem.seq_lens)
        graph.replay()
        eager = flashmla_backend.mla_decode(
            problem.q, problem.kv_cache, plan_of(problem, causal=True), softmax_scale=SCALE
        )
        for layer in (captured[:2], captured[2:]):
            assert torch.equal(layer[0], eager[0]) and torch.equal(layer[1], eager[1]), lengths
        if replay % 20 == 0:
            assert fault(*captured[:2], *oracle(problem, causal=True)) is None


@pytest.mark.parametrize("h_q, s_q", [(80, 4), (16, 1)])
def test_steps_without_a_pause(h_q: int, s_q: int, record_property: Callable[[str, object], None]) -> None:
    """Requests that are cut and others that are not, step after step in one graph, with the same buffers: what the
    combine kernel reads before it waits is of its own step. 320 rows leave two SMs without a decode thread block."""
    record_property("cases", 4000)
    problem = make_problem([5000, 5000], s_q=s_q, h_q=h_q)
    plan = plan_of(problem, causal=True)
    assert int(plan.split_offsets[-1]) > 0
    lengths = [
        torch.tensor(n, dtype=torch.int32, device="cuda") for n in ([5000, 300], [40, 50], [2000, 4000], [64, 0])
    ]

    def decode_step(seq_lens: torch.Tensor, **options: object) -> tuple[torch.Tensor, torch.Tensor]:
        step = replace(problem, seq_lens=seq_lens)
        step_plan = plan_of(step, causal=True, **options)
        return flashmla_backend.mla_decode(step.q, step.kv_cache, step_plan, softmax_scale=SCALE)

    eager = [decode_step(own) for own in lengths]
    seq_lens = lengths[0].clone()

    def run() -> list[tuple[torch.Tensor, torch.Tensor]]:
        results = []
        for own in lengths:
            seq_lens.copy_(own)
            results.append(decode_step(seq_lens, reuse=plan))
        return results

    graph, captured = capture(run)
    for _ in range(1000):
        for tensors in captured:
            for tensor in tensors:
                tensor.fill_(float("nan"))
        graph.replay()
        for ours, expected in zip(captured, eager, strict=True):
            assert torch.equal(ours[0], expected[0]) and torch.equal(ours[1], expected[1])


def test_layer_compiles_to_one_graph() -> None:
    problem = make_problem([65, 3000], h_q=8)
    plan = plan_of(problem, causal=True)

    def layer(q: torch.Tensor) -> torch.Tensor:
        out, lse = flashmla_backend.mla_decode(q * 2, problem.kv_cache, plan, softmax_scale=SCALE)
        return out + lse[..., None].to(out.dtype)

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(problem.q), layer(problem.q))
