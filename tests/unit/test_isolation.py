"""Isolation between requests on the CPU, and that the check which the kernels undergo too can fail."""

from __future__ import annotations

import pytest
import torch

from tests.isolation import MODES, Fill, Variant, decode_with, leaks, own_nan
from tests.kernels.problems import Problem

LENGTHS = [0, 70, 300, 3, 64, 257, 128, 0]


@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize(
    "page_size, dtype, s_q, causal",
    [
        (16, torch.float16, 2, False),
        (32, torch.float32, 3, True),
        (64, torch.bfloat16, 1, True),
        (64, torch.float32, 4, False),
        (128, torch.float16, 4, True),
        (256, torch.bfloat16, 2, True),
    ],
)
def test_nothing_leaks(page_size: int, dtype: torch.dtype, s_q: int, causal: bool, mode: dict[str, object]) -> None:
    cases, faults = leaks(Variant(page_size, dtype, s_q, causal, h_q=4, h_kv=2), mode, "cpu", LENGTHS)
    assert cases == 6 * len(LENGTHS) and not faults


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_a_requests_own_nan_shows(mode: dict[str, object]) -> None:
    assert own_nan(mode, "cpu") == []


def reads_the_whole_last_page(
    fill: Fill, problem: Problem, causal: bool, mode: dict[str, object]
) -> tuple[torch.Tensor, ...]:
    """Unused rows with a weight of 0, as a kernel does that masks the scores and not the values."""
    out, lse = decode_with(fill, problem, causal, mode)
    for request, length in enumerate(problem.seq_lens.tolist()):
        if length % 64:
            page = problem.block_table[request, length // 64]
            out[request] += 0 * problem.kv_cache[page, length % 64 :, :, :512].sum()
    return out, lse


def reads_the_neighbours_query(
    fill: Fill, problem: Problem, causal: bool, mode: dict[str, object]
) -> tuple[torch.Tensor, ...]:
    out, lse = decode_with(fill, problem, causal, mode)
    return out + 1e-2 * problem.q[..., :512].roll(1, 0).clamp(-1, 1).nan_to_num(), lse


def reads_a_workspace(fill: Fill, problem: Problem, causal: bool, mode: dict[str, object]) -> tuple[torch.Tensor, ...]:
    out, lse = decode_with(fill, problem, causal, mode)
    workspace = torch.empty(1)
    fill.put(workspace)
    return out, lse + 0 * workspace


@pytest.mark.parametrize(
    "decode, fills",
    [
        (reads_the_whole_last_page, {"NaN", "inf", "-inf", "0xFF bytes"}),
        (reads_the_neighbours_query, {"inf", "-inf", "huge values", "other requests' data"}),
        (reads_a_workspace, {"NaN", "inf", "-inf", "0xFF bytes"}),
    ],
)
def test_leaks_are_found(decode: object, fills: set[str]) -> None:
    _, faults = leaks(Variant(64, torch.bfloat16, 1, True), {}, "cpu", LENGTHS, decode)
    assert fills <= {fault.partition(":")[0] for fault in faults}
