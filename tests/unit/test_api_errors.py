"""Bad input: every message names the argument, what it was and what is accepted."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

import flashmla_backend
from flashmla_backend import InvalidArgument, Unsupported
from tests.conftest import POISON_PAGE, Problem, make_problem


@pytest.fixture
def problem() -> Problem:
    return make_problem([100, 0, 65], s_q=2, h_q=4)


def plan(problem: Problem, **changes: object) -> flashmla_backend.DecodePlan:
    arguments = {"seq_lens": problem.seq_lens, "block_table": problem.block_table, "s_q": 2, "h_q": 4, "num_sms": 4}
    return flashmla_backend.plan_decode(**(arguments | changes))


PLAN_ERRORS: dict[str, tuple[Callable[[Problem], dict], str]] = {
    "wrong page size": (lambda p: {"page_size": 48}, r"page_size is 48; accepted: 16, 32, 64, 128, 256"),
    "table too narrow": (
        lambda p: {"block_table": p.block_table[:, :1].contiguous()},
        r"block_table is 1 pages of 64 tokens wide, too narrow for a request of 100 tokens; accepted: at least 2",
    ),
    "negative length": (
        lambda p: {"seq_lens": torch.tensor([1, -3, 2], dtype=torch.int32)},
        r"seq_lens contains -3; accepted: 0 or more",
    ),
    "mismatched batch": (
        lambda p: {"seq_lens": p.seq_lens[:2]},
        r"block_table has 3 rows for seq_lens of 2 requests",
    ),
    "lengths in int64": (lambda p: {"seq_lens": p.seq_lens.long()}, r"seq_lens is \[3\] int64; accepted: \[B\] int32"),
    "table in int64": (lambda p: {"block_table": p.block_table.long()}, r"block_table is \[3, 4\] int64"),
    "table as vector": (lambda p: {"block_table": p.block_table[0]}, r"block_table is \[4\] int32"),
    "transposed table": (lambda p: {"block_table": p.block_table.t().contiguous().t()}, r"block_table has strides"),
    "no heads": (lambda p: {"h_q": 0}, r"h_q is 0; accepted: an integer of at least 1"),
    "fractional s_q": (lambda p: {"s_q": 1.5}, r"s_q is 1.5; accepted: an integer"),
    "uneven heads": (lambda p: {"h_q": 5, "h_kv": 2}, r"h_q is 5, h_kv 2; accepted: h_q a multiple of h_kv"),
    "no SMs": (lambda p: {"num_sms": 0}, r"num_sms is 0"),
}


@pytest.mark.parametrize("case", PLAN_ERRORS)
def test_plan_decode(problem: Problem, case: str) -> None:
    changes, message = PLAN_ERRORS[case]
    with pytest.raises(InvalidArgument, match=message):
        plan(problem, **changes(problem))


DECODE_ERRORS: dict[str, tuple[Callable[[Problem], dict], str]] = {
    "wrong head dim": (lambda p: {"q": p.q[..., :512]}, r"q is \[3, 2, 4, 512\] bfloat16; accepted: .* 576"),
    "wrong cache dim": (lambda p: {"kv_cache": p.kv_cache[..., :512]}, r"kv_cache is \[.*, 512\] bfloat16; accepted"),
    "cache without heads": (lambda p: {"kv_cache": p.kv_cache[:, :, 0]}, r"kv_cache is \[\d+, 64, 576\]"),
    "dtype mix": (lambda p: {"kv_cache": p.kv_cache.half()}, r"kv_cache is .* float16 .* q .* bfloat16"),
    "integer query": (lambda p: {"q": p.q.int()}, r"q is \[3, 2, 4, 576\] int32; accepted: bfloat16, float16, float32"),
    "query not contiguous": (lambda p: {"q": p.q.mT.contiguous().mT}, r"q has strides .* a contiguous last dimension"),
    "query with a gradient": (
        lambda p: {"q": p.q.clone().requires_grad_()},
        r"q requires a gradient, .* no backward; accepted: .* torch.no_grad\(\), or q.detach\(\)",
    ),
    "cache not contiguous": (
        lambda p: {"kv_cache": p.kv_cache.transpose(1, 3).contiguous().transpose(1, 3)},
        r"kv_cache has strides .* a contiguous last dimension",
    ),
    "other page size": (
        lambda p: {"kv_cache": p.kv_cache.reshape(-1, 32, 1, 576)},
        r"kv_cache holds pages of 32 tokens, the plan was made for page_size 64",
    ),
    "other KV heads": (lambda p: {"kv_cache": p.kv_cache.expand(-1, -1, 2, -1)}, r"kv_cache has 2 KV heads"),
    "other batch": (lambda p: {"q": p.q[:2]}, r"q is \[2, 2, 4, 576\].*other shapes; accepted: \[3, 2, 4, 576\]"),
    "other query length": (lambda p: {"q": p.q[:, :1]}, r"q is \[3, 1, 4, 576\].*other shapes"),
    "other heads": (lambda p: {"q": p.q[:, :, :3]}, r"q is \[3, 2, 3, 576\].*other shapes"),
    "scale as text": (lambda p: {"softmax_scale": "auto"}, r"softmax_scale is 'auto' of type str; accepted: a Python"),
    "scale as tensor": (lambda p: {"softmax_scale": torch.tensor(0.1)}, r"softmax_scale is .* of type Tensor"),
    "scale missing": (lambda p: {"softmax_scale": None}, r"softmax_scale is None of type NoneType"),
    "scale NaN": (
        lambda p: {"softmax_scale": float("nan")},
        r"softmax_scale is nan; accepted: a finite number greater than 0",
    ),
    "scale zero": (lambda p: {"softmax_scale": 0.0}, r"softmax_scale is 0.0; accepted: a finite number greater than 0"),
    "scale negative": (lambda p: {"softmax_scale": -0.1}, r"softmax_scale is -0.1; accepted: .* greater than 0"),
}


@pytest.mark.parametrize("case", DECODE_ERRORS)
def test_mla_decode(problem: Problem, case: str) -> None:
    made = plan(problem)
    changes, message = DECODE_ERRORS[case]
    arguments = {"q": problem.q, "kv_cache": problem.kv_cache, "softmax_scale": 0.1} | changes(problem)
    with pytest.raises(InvalidArgument, match=message):
        flashmla_backend.mla_decode(
            arguments["q"], arguments["kv_cache"], made, softmax_scale=arguments["softmax_scale"]
        )


@pytest.mark.parametrize("entry", [-1, POISON_PAGE])
def test_table_entry_out_of_range(problem: Problem, entry: int) -> None:
    problem.block_table[2, 1] = entry
    with pytest.raises(InvalidArgument, match=rf"block_table\[2, 1\] is {entry}; accepted: 0 to"):
        flashmla_backend.mla_decode(problem.q, problem.kv_cache, plan(problem), softmax_scale=0.1)


@pytest.mark.parametrize("length", [0, 64, 129])
def test_plan_made_for_other_lengths(problem: Problem, length: int) -> None:
    made = plan(problem)
    problem.seq_lens[0] = length
    with pytest.raises(InvalidArgument, match=r"plan was made for other lengths: it reads 2 pages of request 0"):
        flashmla_backend.mla_decode(problem.q, problem.kv_cache, made, softmax_scale=0.1)


def test_other_devices_are_refused_by_name(problem: Problem) -> None:
    with pytest.raises(Unsupported, match="no decode kernels for meta"):
        plan(problem, seq_lens=problem.seq_lens.to("meta"), block_table=problem.block_table.to("meta"))


def test_errors_are_also_the_builtin_kinds() -> None:
    assert issubclass(InvalidArgument, ValueError) and issubclass(Unsupported, NotImplementedError)


def test_unknown_name() -> None:
    with pytest.raises(AttributeError, match="no attribute 'mla_encode'"):
        flashmla_backend.mla_encode  # noqa: B018
