"""Right answers first: each contender against the oracle, before anything is timed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from flashmla_backend import reference
from flashmla_backend.bench.contenders import Contender
from flashmla_backend.bench.problems import Problem, make_problem
from flashmla_backend.schedule import pages_of

CHECK_LENGTHS = ([1, 777, 64, 2500], [5000], [333, 65])  # causal queries need s_q tokens: shorter ones are left out
LONGEST_ON_CPU = 1000

# Contenders that round scores to bf16 come to about 1e-2 where scores have a deviation of 1, and in proportion where
# they have more; a wrong page or mask to 1e-1 and more.
MAX_RELATIVE_RMS = 2e-2


def compare(out: torch.Tensor, expected: torch.Tensor, spread: float = 1.0) -> dict[str, Any]:
    """Largest error, largest relative root mean square of a request, cosine difference, and the verdict."""
    x, y = out.double().flatten(1), expected.double().flatten(1)  # [B, S_q * H_q * 512]
    error = x - y
    relative = (error.norm(dim=1) / y.norm(dim=1)).max().item()
    finite = bool(x.isfinite().all())
    return {
        "max_abs": error.abs().max().item(),
        "rel_rms": relative,
        "cos_diff": 1 - 2 * (x * y).sum().item() / ((x * x).sum() + (y * y).sum()).item(),
        "nan": not finite,
        "right": finite and relative < MAX_RELATIVE_RMS * max(1.0, spread),
    }


def check_all(
    contenders: Sequence[Contender], pool: torch.Tensor, heads: int, s_q: int, spread: float = 1.0
) -> list[dict[str, Any]]:
    """One record per set of lengths that the pool can hold: the shape, and each contender's figures or its error."""
    records = []
    longest = LONGEST_ON_CPU if pool.device.type == "cpu" else max(map(max, CHECK_LENGTHS))
    for lengths in CHECK_LENGTHS:
        lengths = [min(length, longest) for length in lengths if length >= s_q]
        if sum(map(pages_of, lengths)) > pool.shape[0]:
            continue
        problem = make_problem(pool, lengths, heads, s_q, seed=heads + s_q, spread=spread)
        record: dict[str, Any] = {"h": heads, "s": s_q, "lens": lengths}
        expected, _ = reference.mla_decode(
            problem.queries[0],
            problem.cache,
            problem.block_tables[0],
            problem.seq_lens,
            softmax_scale=problem.softmax_scale,
            dtype=torch.float32,
        )
        for contender in contenders:
            record[contender.name] = check_one(contender, problem, expected)
        records.append(record)
    return records


def check_one(contender: Contender, problem: Problem, expected: torch.Tensor) -> dict[str, Any]:
    try:
        return compare(contender.prepare(problem)[0](), expected, problem.spread)
    except Exception as error:  # a rival that refuses a shape must not end the run
        return {"error": f"{type(error).__name__}: {error}".partition("\n")[0][:200], "right": False}
