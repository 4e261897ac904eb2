"""FLASHMLA_CHECK_BOUNDS=1 on the CPU: what is out of bounds is answered as empty, told at the next step, and over."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

import flashmla_backend
from flashmla_backend import FlashMLAError, InvalidArgument, OutOfBounds, Unsupported, bounds
from flashmla_backend.flash_mla import flash_mla_with_kvcache, get_mla_metadata
from flashmla_backend.plan import DecodePlan
from tests.conftest import POISON_PAGE, Problem, make_problem

LENGTHS = [300, 0, 65, 1000]
WIDTH = 18  # pages that a row of the table holds: 1000 tokens and two more
Result = tuple[torch.Tensor, torch.Tensor]


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    """A fault that a failed test leaves is nobody else's."""
    yield
    bounds.faults_of(torch.device("cpu")).report.zero_()


@pytest.fixture
def checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(bounds.VARIABLE, "1")


def make(seed: int = 0) -> Problem:
    return make_problem(LENGTHS, s_q=2, h_q=4, seed=seed)


def plan_of(problem: Problem, **options: Any) -> DecodePlan:
    options = {"num_pages": len(problem.kv_cache), "s_q": 2, "h_q": 4, "num_sms": 6} | options
    return flashmla_backend.plan_decode(problem.seq_lens, problem.block_table, **options)


def decode(problem: Problem, plan: DecodePlan) -> Result:
    return flashmla_backend.mla_decode(problem.q, problem.kv_cache, plan, softmax_scale=0.05)


def without(problem: Problem, request: int) -> Problem:
    """The same batch with an empty request."""
    return replace(problem, seq_lens=problem.seq_lens.index_fill(0, torch.tensor([request]), 0))


def equal(ours: Result, expected: Result) -> bool:
    return all(torch.equal(x, y) for x, y in zip(ours, expected, strict=True))


# request, what spoils the problem before it is planned, the error
BEFORE: dict[str, tuple[int, Callable[[Problem], object], str]] = {
    "entry too large": (
        2,
        lambda p: p.block_table[2].fill_(POISON_PAGE),
        rf"block_table\[2, 0\] was {POISON_PAGE}; accepted: 0 to 25, the pages of the cache; .*correct the entry",
    ),
    "last entry negative": (
        3,
        lambda p: p.block_table[3, 15].fill_(-1),
        r"block_table\[3, 15\] was -1; accepted: 0 to",
    ),
    "the first page that is not there": (0, lambda p: p.block_table[0, 4].fill_(26), r"block_table\[0, 4\] was 26"),
    "length beyond the table": (
        0,
        lambda p: p.seq_lens[0].fill_(WIDTH * 64 + 1),
        r"seq_lens\[0\] was 1153; accepted: 0 to 1152 tokens, the width of block_table; .*widen the table",
    ),
    "length near 2^31": (
        3,
        lambda p: p.seq_lens[3].fill_(2**31 - 1),
        r"seq_lens\[3\] was 2147483647; accepted: 0 to 1152",
    ),
    "negative length": (3, lambda p: p.seq_lens[3].fill_(-5), r"seq_lens\[3\] was -5; accepted: 0 to 1152 tokens"),
}
# the same between planning and decoding
AFTER: dict[str, tuple[int, Callable[[Problem], object], str]] = {
    "a page more": (
        2,
        lambda p: p.seq_lens[2].fill_(129),
        r"seq_lens\[2\] was 129 in a layer whose plan was made for 65 tokens; accepted: .* as planned, 2; .*"
        "call plan_decode again whenever seq_lens changes",
    ),
    "pages fewer": (3, lambda p: p.seq_lens[3].fill_(3), r"seq_lens\[3\] was 3 in .* made for 1000 tokens"),
    "no longer empty": (1, lambda p: p.seq_lens[1].fill_(7), r"seq_lens\[1\] was 7 in .* made for 0 tokens"),
    "gone": (0, lambda p: p.seq_lens[0].fill_(0), r"seq_lens\[0\] was 0 in .* made for 300 tokens"),
    "negative": (3, lambda p: p.seq_lens[3].fill_(-2), r"seq_lens\[3\] was -2 in .* made for 1000 tokens"),
}


@pytest.mark.usefixtures("checked")
@pytest.mark.parametrize("case", [*BEFORE, *AFTER])
def test_the_request_is_empty_the_others_as_ever_and_the_next_step_is_told(case: str) -> None:
    request, spoil, message = (BEFORE | AFTER)[case]
    expected = decode(make(), plan_of(make()))
    # How requests are cut, and with it rounding, depends on the lengths that are planned.
    planned = without(make(), request) if case in BEFORE else make()
    neighbours = decode(planned, plan_of(planned))
    others = [r for r in range(len(LENGTHS)) if r != request]
    problem = make()
    if case in BEFORE:
        spoil(problem)
    plan = plan_of(problem)
    if case in AFTER:
        spoil(problem)
    out, lse = decode(problem, plan)
    assert not out[request].any() and (lse[request] == float("-inf")).all()
    assert torch.equal(out[others], neighbours[0][others]) and torch.equal(lse[others], neighbours[1][others])

    sound = make()
    with pytest.raises(OutOfBounds, match=f"in an earlier step {message}"):
        plan_of(sound, reuse=plan)
    assert equal(decode(sound, plan_of(sound, reuse=plan)), expected)  # told once, then as if nothing had been
    plan.check()


@pytest.mark.usefixtures("checked")
@pytest.mark.parametrize("page_size, grown, told", [(16, 33, 3), (16, 32, None), (32, 33, 2), (64, 33, None)])
def test_a_page_more_in_the_same_tile_of_64_tokens(page_size: int, grown: int, told: int | None) -> None:
    """Its table entry was not looked at when the step was planned."""
    problem = make_problem([grown, 70], s_q=2, h_q=4, page_size=page_size)
    expected = decode(problem, plan_of(problem, page_size=page_size))
    problem.seq_lens[0] = grown - 1
    plan = plan_of(problem, page_size=page_size)
    problem.seq_lens[0] = grown
    out, lse = decode(problem, plan)
    assert torch.equal(out[1], expected[0][1]) and torch.equal(lse[1], expected[1][1])
    if told is None:
        assert equal((out, lse), expected)
        plan.check()
        return
    assert not out[0].any() and (lse[0] == float("-inf")).all()
    with pytest.raises(
        OutOfBounds, match=rf"{grown - 1} tokens; .* pages of {page_size} tokens as planned, {told - 1}"
    ):
        plan.check()


@pytest.mark.usefixtures("checked")
def test_check_tells_between_steps() -> None:
    problem = make()
    problem.block_table[0, 0] = -1
    plan = plan_of(problem)
    with pytest.raises(OutOfBounds, match=r"block_table\[0, 0\] was -1"):
        plan.check()
    plan.check()


@pytest.mark.usefixtures("checked")
def test_the_first_fault_is_kept_until_it_is_told() -> None:
    problem = make()
    problem.block_table[0, 0] = -1
    problem.seq_lens[3] = -1
    plan = plan_of(problem)
    out, lse = decode(problem, plan)
    assert not out[[0, 1, 3]].any() and (lse[[0, 1, 3]] == float("-inf")).all() and out[2].any()
    with pytest.raises(OutOfBounds, match=r"block_table\[0, 0\] was -1"):
        plan_of(problem, reuse=plan)
    problem.block_table[0, 0] = 0
    plan = plan_of(problem, reuse=plan)
    with pytest.raises(OutOfBounds, match=r"seq_lens\[3\] was -1"):
        plan.check()


@pytest.mark.usefixtures("checked")
@pytest.mark.parametrize("page_size", [16, 64, 256])
def test_nothing_in_bounds_is_touched(page_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bitwise as without the checks; poisoned entries past the last page, rows of padding and full rows are legal."""
    problem = make_problem([0, 1, page_size, 700, 0], s_q=2, h_q=4, page_size=page_size)
    full = problem.block_table[:, : -(-700 // page_size)].clone()
    full[4] = 0
    problem = replace(problem, block_table=full)

    def results() -> list[torch.Tensor]:
        """Of the lengths that are planned, and of one that has grown within its pages: without checks it may too."""
        problem.seq_lens[3] = 697
        plan = plan_of(problem, page_size=page_size)
        first = decode(problem, plan)
        problem.seq_lens[3] = 700
        second = decode(problem, plan)
        plan.check()
        return [*first, *second]

    checked = results()
    monkeypatch.delenv(bounds.VARIABLE)
    for ours, expected in zip(checked, results(), strict=True):
        assert torch.equal(ours, expected)


@pytest.mark.usefixtures("checked")
def test_a_smaller_batch_in_the_same_buffers() -> None:
    largest = make()
    plan = plan_of(largest)
    small = make_problem([70, 3], s_q=2, h_q=4)
    step = plan_of(small, reuse=plan)
    assert plan.bounds is not None and step.bounds is not None
    assert step.bounds.planned_lens.data_ptr() == plan.bounds.planned_lens.data_ptr()
    assert step.bounds.planned_lens.tolist() == [70, 3]
    with pytest.raises(
        InvalidArgument, match="kv_cache has 26 pages, and the plan's table was checked for num_pages 6"
    ):
        decode(replace(small, kv_cache=largest.kv_cache), step)


@pytest.mark.usefixtures("checked")
def test_the_number_of_pages_is_asked_for() -> None:
    with pytest.raises(InvalidArgument, match=r"num_pages is None, and FLASHMLA_CHECK_BOUNDS=1 .* kv_cache.shape\[0\]"):
        plan_of(make(), num_pages=None)
    with pytest.raises(InvalidArgument, match=r"num_pages is 0, .* at least 1"):
        plan_of(make(), num_pages=0)


@pytest.mark.usefixtures("checked")
def test_drop_in() -> None:
    problem = make()
    with pytest.raises(
        Unsupported, match=r"FLASHMLA_CHECK_BOUNDS=1 was set: .* get_mla_metadata\(\) without arguments"
    ):
        get_mla_metadata(problem.seq_lens, 2 * 4, 1)
    problem.block_table[3, 1] = POISON_PAGE
    metadata, _ = get_mla_metadata()
    for _ in range(2):
        out, _ = flash_mla_with_kvcache(
            problem.q, problem.kv_cache, problem.block_table, problem.seq_lens, 512, metadata, causal=True
        )
        assert not out[3].any() and out[0].any()
    assert metadata.plan is not None
    with pytest.raises(OutOfBounds, match=r"block_table\[3, 1\]"):
        metadata.plan.check()


@pytest.mark.parametrize("value", ["", "0"])
def test_off(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(bounds.VARIABLE, value)
    plan = plan_of(make(), num_pages=None)
    plan.check()
    assert plan.bounds is None


def test_one_kind_of_error() -> None:
    assert issubclass(OutOfBounds, InvalidArgument) and issubclass(OutOfBounds, FlashMLAError)
