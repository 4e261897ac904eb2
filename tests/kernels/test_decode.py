"""The decode and combine kernels against an fp64 oracle."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

import flashmla_backend
from flashmla_backend import InvalidArgument
from flashmla_backend.flash_mla import flash_mla_with_kvcache, get_mla_metadata
from flashmla_backend.paging import PAGE_SIZES
from flashmla_backend.workspace import workspace_size
from tests.isolation import MODES
from tests.kernels.problems import (
    DTYPES,
    HEADS,
    SCALE,
    Case,
    Problem,
    decode,
    fault,
    fault_of,
    grid,
    make_block_table,
    make_problem,
    oracle,
    plan_of,
)

Record = Callable[[str, object], None]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("s_q", [1, 2, 4])
@pytest.mark.parametrize("h_q, h_kv", HEADS)
def test_grid(h_q: int, h_kv: int, s_q: int, dtype: torch.dtype, record_property: Record) -> None:
    cases = list(grid(h_q, h_kv, s_q, dtype))
    record_property("cases", len(cases))
    faults = {case: found for case in cases if (found := fault_of(case))}
    assert not faults


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("s_q", [1, 2, 4])
@pytest.mark.parametrize("h_q", [16, 64, 128])
def test_half_the_lengths_are_zero(h_q: int, s_q: int, dtype: torch.dtype) -> None:
    lengths = [0 if i % 2 else (37 * i) % 1500 for i in range(128)]
    problem = make_problem(lengths, s_q=s_q, h_q=h_q, dtype=dtype)
    assert fault(*decode(problem, causal=True), *oracle(problem, causal=True)) is None


@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("h_q", [64, 128])
def test_rounding_when_few_tokens_dominate(h_q: int, dtype: torch.dtype, mode: dict[str, object]) -> None:
    """Not much further off than the output's own rounding: rescaling must not be too lazy."""
    problem = make_problem([512] * 160, h_q=h_q, dtype=dtype)
    scale = 4 / 2.4  # scores deviate by 4: q is drawn with deviation 1, tokens with 0.1
    plan = plan_of(problem, causal=False, **mode)
    out, _ = flashmla_backend.mla_decode(problem.q, problem.kv_cache, plan, softmax_scale=scale)
    expected, _ = oracle(problem, causal=False, scale=scale)
    error, rounding = ((x.double() - expected).square().mean().sqrt() for x in (out, expected.to(dtype)))
    # If maxima may grow by 2^8, 1.3; by 2^3, as in batch-invariant mode, 1.1; as in free mode, 1.04. 0.4 more where
    # leaves are fp16 as the output is.
    limit = 1.2 if mode else 1.08
    assert error < (1.5 if mode and dtype == torch.float16 else limit) * rounding


@pytest.mark.parametrize("h_q", [64, 128])
def test_probabilities_are_rounded_as_if_always_rescaled(h_q: int) -> None:
    """Where few tokens dominate, the same answers as those of rivals, but for their own rounding."""
    problem = make_problem([512] * (128 * 64 // h_q), h_q=h_q)
    scale = 4 / 2.4  # scores deviate by 4
    plan = plan_of(problem, causal=False)
    assert int(plan.split_offsets[-1]) == 0  # nothing is cut: a piece has maxima of its own
    out, _ = flashmla_backend.mla_decode(problem.q, problem.kv_cache, plan, softmax_scale=scale)
    expected, _ = oracle(problem, causal=False, scale=scale)
    distance, rounding = (
        (x.double() - y.double()).square().mean().sqrt()
        for x, y in ((out, always_rescaled(problem, scale)), (expected.bfloat16(), expected))
    )
    # 0.08 as it is; by emulation 0.6 if maxima may grow by 2^3, 0.13 by 2^0.5.
    assert distance < 0.1 * rounding


def always_rescaled(problem: Problem, scale: float) -> torch.Tensor:
    """[B, 1, H_q, 512] bf16: exponentials relative to the largest score so far, page by page, rounded to bf16."""
    tokens = problem.tokens[:, :, 0].float()  # [B, L, 576]
    scores = problem.q[:, 0].float() @ tokens.mT * scale  # [B, H_q, L]
    shape = (*scores.shape[:2], 1)
    largest, total = torch.full(shape, float("-inf"), device="cuda"), torch.zeros(shape, device="cuda")
    out = torch.zeros(*shape[:2], 512, device="cuda", dtype=torch.float64)
    for page, values in zip(scores.split(64, -1), tokens[..., :512].split(64, 1), strict=True):
        grown = torch.maximum(largest, page.amax(-1, keepdim=True))
        rescale, probabilities = torch.exp(largest - grown), torch.exp(page - grown)
        out = out * rescale + probabilities.bfloat16().double() @ values.double()
        total = total * rescale + probabilities.sum(-1, keepdim=True)
        largest = grown
    return (out / total).bfloat16()[:, None]


@pytest.mark.parametrize("page_size", PAGE_SIZES)
def test_page_sizes(page_size: int) -> None:
    for case in (
        Case(6, 1, 700, 16, 1, True, True, torch.bfloat16, page_size),
        Case(3, 2, 5000, 128, 2, True, True, torch.float16, page_size),
    ):
        assert fault_of(case) is None


def in_pages_of(problem: Problem, page_size: int) -> Problem:
    """The same tokens in shuffled pages of another size; all else in the cache is NaN."""
    generator = torch.Generator(problem.q.device).manual_seed(page_size)
    table, pages = make_block_table(problem.seq_lens, page_size, generator)
    tokens = problem.tokens
    cache = tokens.new_full((pages, page_size, *tokens.shape[2:]), float("nan"))
    token = torch.arange(tokens.shape[1], device=tokens.device)
    request, token = (token < problem.seq_lens[:, None]).nonzero(as_tuple=True)
    cache[table[request, token // page_size].long(), token % page_size] = tokens[request, token]
    return replace(problem, kv_cache=cache, block_table=table)


@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("h_q, h_kv, s_q", [(16, 1, 1), (128, 1, 2), (20, 2, 3)])
def test_bits_do_not_depend_on_the_page_size(
    h_q: int, h_kv: int, s_q: int, dtype: torch.dtype, mode: dict[str, object]
) -> None:
    """Lengths at the edges of every page size, and requests that are cut."""
    edges = [length + d for length in (16, 32, 48, 64, 80, 128, 256) for d in (-1, 0, 1)]
    problem = make_problem([0, 1, *edges, 3000, 9000], s_q=s_q, h_q=h_q, h_kv=h_kv, dtype=dtype)

    def results(paged: Problem) -> tuple[torch.Tensor, torch.Tensor]:
        plan = plan_of(paged, causal=True, **mode)
        return flashmla_backend.mla_decode(paged.q, paged.kv_cache, plan, softmax_scale=SCALE)

    expected = results(problem)
    assert fault(*expected, *oracle(problem, causal=True)) is None
    for page_size in PAGE_SIZES:
        for ours, theirs in zip(results(in_pages_of(problem, page_size)), expected, strict=True):
            assert torch.equal(ours, theirs), page_size


@pytest.mark.parametrize("page_size", [16, 32])
def test_small_pages_may_be_views(page_size: int) -> None:
    """Gaps between rows, heads and pages, in all of which is NaN, and lengths that fill only part of a tile."""
    problem = make_problem([0, 1, 15, 17, 33, 49, 63, 65, 1000], h_q=20, h_kv=2, page_size=page_size)
    wide = problem.q.new_full((len(problem.kv_cache), 3, page_size, 3, 640), float("nan"))
    wide[:, 1, :, :2, :576] = problem.kv_cache
    views = replace(problem, kv_cache=wide[:, 1, :, :2, :576])
    for ours, expected in zip(decode(views, causal=True), decode(problem, causal=True), strict=True):
        assert torch.equal(ours, expected)


@pytest.mark.parametrize("page_size", [16, 32])
def test_a_plan_older_than_its_lengths(page_size: int) -> None:
    """Lengths that grew within their last tile take in pages of it, and those that shrank leave all of some tiles."""
    problem = make_problem([64, 700, 3000, 130, 5], page_size=page_size)
    planned = problem.seq_lens.clone()
    planned.copy_(torch.tensor([1, 641, 3000, 640, 1000]))
    plan = plan_of(replace(problem, seq_lens=planned), causal=True)
    planned.copy_(problem.seq_lens)
    result = flashmla_backend.mla_decode(problem.q, problem.kv_cache, plan, softmax_scale=SCALE)
    assert fault(*result, *oracle(problem, causal=True)) is None


@pytest.mark.parametrize("length", [1, 2, 5, 63, 64, 65, 127, 128, 129, 513, 100_000])
def test_edge_lengths(length: int) -> None:
    """Lengths below s_q included: such rows see nothing."""
    problem = make_problem([length, 1, 0], s_q=5, h_q=7)
    assert fault(*decode(problem, causal=True), *oracle(problem, causal=True)) is None


CUT = [5000, 64, 700, 130]  # lengths of which some are cut, whatever the heads


@pytest.mark.parametrize("batch_invariant", [False, True])
@pytest.mark.parametrize("exponent", [-80, -20, 20, 80])
@pytest.mark.parametrize("h_q", [1, 16, 126])
def test_partial_results_keep_their_precision_at_any_magnitude(h_q: int, exponent: int, batch_invariant: bool) -> None:
    """A cache of other powers of two, and queries of the inverse ones: the same scores, and the same bits of O."""
    problem = make_problem(CUT, h_q=h_q)
    plan = plan_of(problem, causal=True, batch_invariant=batch_invariant)
    assert plan.split_offsets[-1] > 0
    out, lse = flashmla_backend.mla_decode(problem.q, problem.kv_cache, plan, softmax_scale=SCALE)
    other = problem.q * 2.0**-exponent, problem.kv_cache * 2.0**exponent
    scaled, scaled_lse = flashmla_backend.mla_decode(*other, plan, softmax_scale=SCALE)
    assert torch.equal(scaled.double(), out.double() * 2.0**exponent) and torch.equal(lse, scaled_lse)


@pytest.mark.parametrize("batch_invariant", [False, True])
def test_partial_results_keep_columns_of_all_magnitudes(batch_invariant: bool) -> None:
    """Every column of V is of a magnitude of its own, down to 2^-40: each is as precise as it would be alone."""
    problem = make_problem(CUT, h_q=16)
    magnitudes = 2.0 ** -(torch.arange(512, device="cuda") * 37 % 41)
    for rows in (problem.kv_cache, problem.tokens):
        rows[..., :512] *= magnitudes
    plan = plan_of(problem, causal=True, batch_invariant=batch_invariant)
    out, lse = flashmla_backend.mla_decode(problem.q, problem.kv_cache, plan, softmax_scale=SCALE)
    expected_out, expected_lse = oracle(problem, causal=True)
    fine = magnitudes > 2.0**-28  # what fp16 holds in full below a row's largest
    assert fault(out / magnitudes * fine, lse, expected_out / magnitudes * fine, expected_lse) is None
    assert (out - expected_out).abs()[..., ~fine].max() < 2.0**-38


@pytest.mark.parametrize(
    "h_q, tokens", [(h_q, [20_000] + [400] * 40) for h_q in (4, 8, 16)] + [(64, [30_000] + [1000] * 40)]
)
def test_a_warp_merges_more_pieces_than_it_has_lanes(h_q: int, tokens: list[int]) -> None:
    """One long request among many that are cut, so that a slice is one warp's; all builds of the combine."""
    problem = make_problem(tokens, h_q=h_q)
    offsets = plan_of(problem, causal=True).split_offsets
    assert offsets[1] - offsets[0] > 32 and (offsets.diff() > 0).all()
    assert fault(*decode(problem, causal=True), *oracle(problem, causal=True)) is None


def test_queries_outnumber_tokens_without_a_mask() -> None:
    problem = make_problem([1, 3, 7, 8, 66, 300], s_q=8, h_q=4)
    assert fault(*decode(problem, causal=False), *oracle(problem, causal=False)) is None


def test_empty_batch() -> None:
    q = torch.empty(0, 1, 4, 576, dtype=torch.bfloat16, device="cuda")
    kv_cache = torch.empty(3, 64, 1, 576, dtype=torch.bfloat16, device="cuda")
    seq_lens, block_table = (torch.empty(shape, dtype=torch.int32, device="cuda") for shape in (0, (0, 4)))
    plan = flashmla_backend.plan_decode(seq_lens, block_table, s_q=1, h_q=4)
    out, lse = flashmla_backend.mla_decode(q, kv_cache, plan, softmax_scale=SCALE)
    assert out.shape == (0, 1, 4, 512) and lse.shape == (0, 1, 4)


def test_batch_of_4096() -> None:
    problem = make_problem([(7 * i) % 90 for i in range(4096)], h_q=16)
    assert fault(*decode(problem, causal=True), *oracle(problem, causal=True)) is None


def test_one_sequence_of_a_million_tokens() -> None:
    problem = make_problem([1 << 20], h_q=16)
    assert fault(*decode(problem, causal=True), *oracle(problem, causal=True)) is None


@pytest.mark.parametrize("distance", [2**31, 2**32])
def test_pages_far_apart(distance: int) -> None:
    """The last page begins past `distance` elements: page id times stride does not fit 32 bits."""
    problem = make_problem([300, 64], h_q=16)
    pages, page_size = problem.kv_cache.shape[:2]
    stride = -(-distance // (pages - 1) // 64) * 64
    if torch.cuda.mem_get_info()[0] < stride * pages * 2 + (4 << 30):
        pytest.skip("not enough GPU memory")
    room = torch.empty(stride * (pages - 1) + page_size * 576, dtype=torch.bfloat16, device="cuda")
    far = room.as_strided(problem.kv_cache.shape, (stride, 576, 576, 1))
    far.copy_(problem.kv_cache)
    moved = Problem(problem.q, far, problem.block_table, problem.seq_lens, problem.tokens)
    assert fault(*decode(moved, causal=True), *oracle(problem, causal=True)) is None


def test_inputs_may_be_views() -> None:
    problem = make_problem([100, 65], h_q=8)
    wide = torch.full((problem.kv_cache.shape[0], 2, 64, 1, 640), float("nan"), dtype=torch.bfloat16, device="cuda")
    wide[:, 1, :, :, :576] = problem.kv_cache
    padded = torch.full((2, 1, 11, 704), float("nan"), dtype=torch.bfloat16, device="cuda")
    padded[:, :, :8, :576] = problem.q
    views = Problem(
        padded[:, :, :8, :576], wide[:, 1, :, :, :576], problem.block_table, problem.seq_lens, problem.tokens
    )
    for ours, expected in zip(decode(views, causal=True), decode(problem, causal=True), strict=True):
        assert torch.equal(ours, expected)


@pytest.mark.parametrize("s_q", [1, 3])
@pytest.mark.parametrize("h_q", [5, 16, 128])
def test_latent_and_rope_columns_may_lie_apart(h_q: int, s_q: int) -> None:
    """The latent part as a matmul over heads leaves it, [H_q, B * S_q, 512]."""
    problem = make_problem([0, 100, 65, 3000], s_q=s_q, h_q=h_q)
    by_head = problem.q[..., :512].flatten(0, 1).transpose(0, 1).contiguous()
    latent, rope = by_head.transpose(0, 1).unflatten(0, (-1, s_q)), problem.q[..., 512:].clone()
    plan = plan_of(problem, causal=True)
    apart = flashmla_backend.mla_decode((latent, rope), problem.kv_cache, plan, softmax_scale=SCALE)
    for ours, expected in zip(apart, decode(problem, causal=True), strict=True):
        assert torch.equal(ours, expected)


@pytest.mark.parametrize("style", ["pair", "object"])
def test_drop_in(style: str) -> None:
    problem = make_problem([0, 1, 64, 65, 300, 9000], s_q=2, h_q=16)
    arguments = (problem.seq_lens, 2 * 16, 1) if style == "pair" else ()
    metadata, num_splits = get_mla_metadata(*arguments)
    expected_out, expected_lse = oracle(problem, causal=True)
    for _ in range(2):
        out, lse = flash_mla_with_kvcache(
            problem.q, problem.kv_cache, problem.block_table, problem.seq_lens, 512, metadata, num_splits, SCALE, True
        )
        assert (lse[0] == float("inf")).all()
        lse = lse.where(lse != float("inf"), float("-inf")).transpose(1, 2)
        assert fault(out, lse, expected_out, expected_lse) is None


def test_a_workspace_between_cache_lines_is_refused() -> None:
    problem = make_problem([100], h_q=8)
    storage = torch.empty(workspace_size(problem.q.device, s_q=1, h_q=8) + 8, device="cuda")
    with pytest.raises(InvalidArgument, match="workspace begins 32 bytes after a multiple of 128; accepted"):
        plan_of(problem, causal=True, workspace=storage[8:])


def test_unsuitable_input_is_refused_by_name() -> None:
    problem = make_problem([100, 65], h_q=8)
    plan = plan_of(problem, causal=True)

    def run(q: torch.Tensor, kv_cache: torch.Tensor) -> None:
        flashmla_backend.mla_decode(q, kv_cache, plan, softmax_scale=SCALE)

    padded = torch.zeros(2, 1, 8, 577, dtype=torch.bfloat16, device="cuda")
    with pytest.raises(InvalidArgument, match=r"q_latent\.(head|batch)_stride is (577|4616) elements"):
        run(padded[..., :576], problem.kv_cache)
    shifted = torch.zeros(2 * 8 * 576 + 1, dtype=torch.bfloat16, device="cuda")[1:].view(2, 1, 8, 576)
    with pytest.raises(InvalidArgument, match=r"q_latent is at 0x[0-9a-f]+; accepted: .* aligned to 16 bytes"):
        run(shifted, problem.kv_cache)
    with pytest.raises(InvalidArgument, match=r"q is .* float32; accepted: bfloat16, float16"):
        run(problem.q.float(), problem.kv_cache.float())
    small = make_problem([100], page_size=8)
    with pytest.raises(InvalidArgument, match="page_size is 8; accepted: 16, 32, 64, 128, 256"):
        plan_of(small, causal=True)
