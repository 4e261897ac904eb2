"""FLASHMLA_CHECK_BOUNDS=1 on the GPU: what is out of bounds is answered as empty, told at the next step, and over."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch

import flashmla_backend
from flashmla_backend import OutOfBounds, bounds
from flashmla_backend.plan import DecodePlan
from tests.kernels.problems import POISON_PAGE, SCALE, Problem, capture, fault, make_problem, oracle, plan_of

LENGTHS = [3000, 0, 65, 9000, 700, 64]
Spoil = Callable[[Problem], object]
Result = tuple[torch.Tensor, torch.Tensor]


@pytest.fixture(autouse=True)
def checked(monkeypatch: pytest.MonkeyPatch, hopper: None) -> Iterator[None]:
    monkeypatch.setenv(bounds.VARIABLE, "1")
    yield
    torch.cuda.synchronize()
    bounds.faults_of(torch.device("cuda", torch.cuda.current_device())).report.zero_()


def make(h_q: int = 16, s_q: int = 1, page_size: int = 64) -> Problem:
    return make_problem(LENGTHS, h_q=h_q, s_q=s_q, page_size=page_size)


def decode(problem: Problem, plan: DecodePlan) -> Result:
    return flashmla_backend.mla_decode(problem.q, problem.kv_cache, plan, softmax_scale=SCALE)


def raised_by(call: Callable[[], object], message: str) -> None:
    """Once the device is done, `call` raises; the next look finds nothing."""
    torch.cuda.synchronize()
    with pytest.raises(OutOfBounds, match=f"in an earlier step {message}"):
        call()


def last_entry(problem: Problem, request: int) -> int:
    return (LENGTHS[request] - 1) // problem.kv_cache.shape[1]


# request, what spoils the problem before it is planned, the error
BEFORE: dict[str, tuple[int, Spoil, str]] = {
    "entry too large": (3, lambda p: p.block_table[3, 0].fill_(POISON_PAGE), rf"block_table\[3, 0\] was {POISON_PAGE}"),
    "all entries negative": (0, lambda p: p.block_table[0].fill_(-1), r"block_table\[0, 0\] was -1; accepted: 0 to"),
    "the first page that is not there": (
        2,
        lambda p: p.block_table[2, last_entry(p, 2)].fill_(len(p.kv_cache)),
        r"block_table\[2, \d\] was",
    ),
    "last entry": (3, lambda p: p.block_table[3, last_entry(p, 3)].fill_(-7), r"block_table\[3, \d+\] was -7"),
    "length beyond the table": (
        4,
        lambda p: p.seq_lens[4].fill_(p.block_table.shape[1] * p.kv_cache.shape[1] + 1),
        r"seq_lens\[4\] was \d+; accepted: 0 to \d+ tokens, the width of block_table",
    ),
    "length near 2^31": (5, lambda p: p.seq_lens[5].fill_(2**31 - 1), r"seq_lens\[5\] was 2147483647"),
    "negative length": (4, lambda p: p.seq_lens[4].fill_(-5), r"seq_lens\[4\] was -5; accepted: 0 to"),
}
# the same between planning and decoding
AFTER: dict[str, tuple[int, Spoil, str]] = {
    "a tile more": (
        2,
        lambda p: p.seq_lens[2].fill_(129),
        r"seq_lens\[2\] was 129 .* for 65 tokens; .* planned, [25]",
    ),
    "many tiles more": (5, lambda p: p.seq_lens[5].fill_(9000), r"seq_lens\[5\] was 9000 .* made for 64 tokens"),
    "far fewer, of a request that was cut": (3, lambda p: p.seq_lens[3].fill_(3), r"seq_lens\[3\] was 3 .* for 9000"),
    "a tile fewer": (4, lambda p: p.seq_lens[4].fill_(640), r"seq_lens\[4\] was 640 .* made for 700 tokens"),
    "no longer empty": (1, lambda p: p.seq_lens[1].fill_(7), r"seq_lens\[1\] was 7 .* made for 0 tokens"),
    "gone": (0, lambda p: p.seq_lens[0].fill_(0), r"seq_lens\[0\] was 0 .* made for 3000 tokens"),
    "negative": (3, lambda p: p.seq_lens[3].fill_(-2), r"seq_lens\[3\] was -2 .* made for 9000 tokens"),
}


@pytest.mark.parametrize("h_q, s_q, page_size", [(16, 1, 64), (128, 2, 64), (16, 2, 256), (20, 2, 16)])
@pytest.mark.parametrize("case", [*BEFORE, *AFTER])
def test_the_request_is_empty_the_others_as_ever_and_the_next_step_is_told(
    case: str, h_q: int, s_q: int, page_size: int
) -> None:
    request, spoil, message = (BEFORE | AFTER)[case]
    others = [r for r in range(len(LENGTHS)) if r != request]
    sound = make(h_q, s_q, page_size)
    sound_plan = plan_of(sound, causal=True)
    expected = decode(sound, sound_plan)
    # How requests are cut, and with it rounding, depends on the lengths that are planned.
    planned = sound
    if case in BEFORE:
        planned = replace(sound, seq_lens=sound.seq_lens.clone())
        planned.seq_lens[request] = 0
    neighbours = decode(planned, plan_of(planned, causal=True))

    problem = make(h_q, s_q, page_size)
    if case in BEFORE:
        spoil(problem)
    plan = plan_of(problem, causal=True)
    if case in AFTER:
        spoil(problem)
    for _ in range(2):  # layers
        out, lse = decode(problem, plan)
        assert not out[request].any() and (lse[request] == float("-inf")).all()
        assert torch.equal(out[others], neighbours[0][others]) and torch.equal(lse[others], neighbours[1][others])

    raised_by(lambda: plan_of(sound, causal=True, reuse=plan), message)
    again = decode(sound, plan_of(sound, causal=True, reuse=plan))
    assert torch.equal(again[0], expected[0]) and torch.equal(again[1], expected[1])
    torch.cuda.synchronize()
    plan.check()


@pytest.mark.parametrize("batch_invariant", [False, True])
@pytest.mark.parametrize("page_size, grown, told", [(16, 33, 3), (16, 32, None), (32, 33, 2), (64, 33, None)])
def test_a_page_more_in_the_same_tile_of_64_tokens(
    page_size: int, grown: int, told: int | None, batch_invariant: bool
) -> None:
    """Its table entry was not looked at when the step was planned, and is not followed."""
    problem = make_problem([grown, 70, 3000], s_q=2, h_q=128, page_size=page_size)
    mode = {"causal": True, "batch_invariant": batch_invariant}
    expected = decode(problem, plan_of(problem, **mode))
    problem.seq_lens[0] = grown - 1
    plan = plan_of(problem, **mode)
    problem.seq_lens[0] = grown
    if told:
        problem.block_table[0, told - 1] = POISON_PAGE
    for _ in range(2):  # layers
        out, lse = decode(problem, plan)
        assert torch.equal(out[1:], expected[0][1:]) and torch.equal(lse[1:], expected[1][1:])
        if told:
            assert not out[0].any() and (lse[0] == float("-inf")).all()
        else:
            assert torch.equal(out[0], expected[0][0]) and torch.equal(lse[0], expected[1][0])
    torch.cuda.synchronize()
    if told:
        raised_by(plan.check, rf"seq_lens\[0\] was {grown} .* pages of {page_size} tokens as planned, {told - 1}")
    plan.check()


def test_a_table_that_fills_its_memory() -> None:
    """The table ends where its memory ends: a length beyond it must not be followed there."""
    problem = make_problem([64 * 64] * 8, h_q=16)
    table = problem.block_table[:, :64].contiguous()
    problem = replace(problem, block_table=table, seq_lens=problem.seq_lens.clone())
    problem.seq_lens[7] = 2**31 - 64
    out, _ = decode(problem, plan := plan_of(problem, causal=True))
    assert not out[7].any() and out[:7].any()
    raised_by(plan.check, r"seq_lens\[7\] was 2147483584; accepted: 0 to 4096 tokens")


def test_every_request_at_fault() -> None:
    problem = make_problem([100] * 300, h_q=16)
    problem.block_table[:] = POISON_PAGE
    plan = plan_of(problem, causal=True)
    out, lse = decode(problem, plan)
    assert not out.any() and (lse == float("-inf")).all()
    raised_by(plan.check, rf"block_table\[\d+, 0\] was {POISON_PAGE}")
    plan.check()


def test_without_the_checks_nothing_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bitwise, rows of padding and lengths that grow within their last tile included."""

    def results() -> list[torch.Tensor]:
        problem = make(128, 2)
        problem.block_table[1] = 0
        problem.seq_lens[4] = 690  # in the tiles of 700
        plan = plan_of(problem, causal=True)
        first = decode(problem, plan)
        problem.seq_lens[4] = 700
        second = decode(problem, plan)
        torch.cuda.synchronize()
        plan.check()
        assert fault(*second, *oracle(problem, causal=True)) is None
        return [*first, *second]

    checked = results()
    monkeypatch.delenv(bounds.VARIABLE)
    for ours, expected in zip(checked, results(), strict=True):
        assert torch.equal(ours, expected)


def test_a_length_that_shrank_without_the_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole tiles past the length are masked like rows are."""
    monkeypatch.delenv(bounds.VARIABLE)
    problem = make()
    plan = plan_of(problem, causal=True)
    for request, length in ((3, 200), (0, 64), (4, 1)):
        problem.seq_lens[request] = length
        problem.tokens[request, length:] = 0
    assert fault(*decode(problem, plan), *oracle(problem, causal=True)) is None


def test_replays_of_a_graph() -> None:
    """Planning and two layers in a graph: a corrupt table, a bad length, each told after its replay."""
    sound = make()
    problem = replace(sound, block_table=sound.block_table.clone(), seq_lens=sound.seq_lens.clone())
    plan = plan_of(problem, causal=True)

    def step() -> list[torch.Tensor]:
        step_plan = plan_of(problem, causal=True, reuse=plan)
        return [*decode(problem, step_plan), *decode(problem, step_plan)]

    graph, captured = capture(step)
    expected = decode(sound, plan_of(sound, causal=True))

    spoils: list[tuple[int, Spoil, str]] = [
        (3, lambda p: p.block_table[3, 100].fill_(POISON_PAGE), r"block_table\[3, 100\] was"),
        (4, lambda p: p.seq_lens[4].fill_(1 << 30), r"seq_lens\[4\] was 1073741824"),
    ]
    for request, spoil, message in spoils:
        problem.block_table.copy_(sound.block_table)
        problem.seq_lens.copy_(sound.seq_lens)
        spoil(problem)
        for _ in range(2):
            graph.replay()
        for out, lse in (captured[:2], captured[2:]):
            assert not out[request].any() and (lse[request] == float("-inf")).all()
        raised_by(plan.check, message)
        plan.check()
        problem.block_table.copy_(sound.block_table)
        problem.seq_lens.copy_(sound.seq_lens)
        graph.replay()
        for layer in (captured[:2], captured[2:]):
            assert torch.equal(layer[0], expected[0]) and torch.equal(layer[1], expected[1])
        torch.cuda.synchronize()
        plan.check()


def test_layers_in_a_graph_with_an_old_plan() -> None:
    """Only the layer is captured: lengths that no longer are those of the plan are found at replay."""
    problem = make()
    plan = plan_of(problem, causal=True)
    expected = decode(problem, plan)
    graph, (out, lse) = capture(lambda: decode(problem, plan))
    problem.seq_lens[3] = 9064
    graph.replay()
    assert not out[3].any() and torch.equal(out[:3], expected[0][:3]) and torch.equal(lse[4:], expected[1][4:])
    raised_by(plan.check, r"seq_lens\[3\] was 9064 .* made for 9000 tokens")
    problem.seq_lens[3] = 9000
    graph.replay()
    assert torch.equal(out, expected[0]) and torch.equal(lse, expected[1])
    torch.cuda.synchronize()
    plan.check()
