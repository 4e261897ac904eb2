"""The calls vLLM makes of our classes, in the shapes its releases from 0.26 to 0.33 make them."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.model_executor.layers.attention.mla_attention import MLACommonMetadataBuilder, QueryLenSupport
from vllm.v1.attention.backend import AttentionCGSupport, AttentionType
from vllm.v1.worker.utils import select_common_block_size

from flashmla_backend import bounds, plan_decode, reference
from flashmla_backend.errors import Unsupported
from flashmla_backend.integration.claim import BATCH_INVARIANT_VARIABLE
from flashmla_backend.integration.planner import StepPlanner
from flashmla_backend.integration.vllm.backend import FlashMLABackend
from flashmla_backend.integration.vllm.builder import SHORT_PREFILL, FlashMLAMetadataBuilder, is_uniform
from flashmla_backend.integration.vllm.impl import FlashMLAImpl
from tests.conftest import check_close, make_problem

HEADS = 3
SCALE = 0.1


def build_decode(
    problem: Any, counts: int | list[int], planner: StepPlanner | None = None, padding: int = 0, **newer: Any
) -> Any:
    """counts: new tokens of every request, or of each. padding: tokens of no request."""
    batch, longest = len(problem.seq_lens), counts if isinstance(counts, int) else 1
    builder = object.__new__(FlashMLAMetadataBuilder)
    builder.planner = planner or StepPlanner(torch.device("cpu"), h_q=HEADS, page_size=64, longest_query=longest)
    builder.longest_uniform = longest
    each = [counts] * batch if isinstance(counts, int) else counts
    offsets = torch.tensor([0, *each], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    return builder._build_decode(
        block_table_tensor=problem.block_table,
        seq_lens_device=problem.seq_lens,
        max_seq_len=int(problem.seq_lens.max()),
        query_start_loc_cpu=offsets,
        query_start_loc_device=offsets,
        num_decode_tokens=int(offsets[-1]) + padding,
        dcp_tot_seq_lens_device=None,
        **newer,
    )


def impl() -> FlashMLAImpl:
    made = object.__new__(FlashMLAImpl)
    made.scale = SCALE
    return made


def spread_pages(cache: torch.Tensor) -> torch.Tensor:
    """The same [P, 64, 576] cache, its pages 96 rows apart."""
    wide = torch.full((cache.shape[0], 96, cache.shape[2]), float("nan"), dtype=cache.dtype)
    wide[:, :64] = cache
    return wide[:, :64]


@pytest.mark.parametrize("newer", [{}, {"max_query_len": 2}], ids=["0.26", "0.33"])
def test_one_plan_a_step(newer: dict[str, int]) -> None:
    problem = make_problem([64, 0, 3, 200], s_q=2, h_q=HEADS)
    decode = build_decode(problem, 2, **newer)
    assert decode.block_table is problem.block_table
    assert decode.seq_lens is problem.seq_lens
    expected = plan_decode(problem.seq_lens, problem.block_table, s_q=2, h_q=HEADS, page_size=64, causal=True)
    assert str(decode.plan(num_pages=len(problem.kv_cache))) == str(expected)


@pytest.mark.parametrize("padding", [0, 5])
@pytest.mark.parametrize("counts", [[1, 0, 3, 20], [3, 3, 3, 3]], ids=["ragged", "more than graphs are made for"])
def test_requests_with_different_numbers_of_new_tokens(counts: list[int], padding: int) -> None:
    problem = make_problem([64, 5, 3, 200], h_q=HEADS, dtype=torch.float32)
    q = torch.randn(sum(counts) + padding, HEADS, 576, generator=torch.Generator().manual_seed(1))
    metadata = SimpleNamespace(num_decodes=4, decode=build_decode(problem, counts, padding=padding))
    out, lse = impl().forward_mqa((q[..., :512], q[..., 512:]), problem.kv_cache.squeeze(2), metadata, layer=None)
    assert out.shape == (len(q), HEADS, 512) and lse.shape == (len(q), HEADS)
    first = 0
    for request, count in enumerate(counts):
        own = slice(first, first + count)
        first += count
        if count == 0:
            continue
        expected_out, expected_lse = reference.mla_decode(
            q[None, own],
            problem.kv_cache,
            problem.block_table[request, None],
            problem.seq_lens[request, None],
            softmax_scale=SCALE,
        )
        check_close(out[own], lse[own], expected_out[0], expected_lse[0])


def test_padding_of_a_graph_leaves_a_step_uniform() -> None:
    """Its rows have no new tokens, but room for them in q."""
    assert is_uniform(torch.tensor([0, 2, 4, 4, 4], dtype=torch.int32), 2)
    assert not is_uniform(torch.tensor([0, 2, 4, 5], dtype=torch.int32), 2)
    assert not is_uniform(torch.tensor([0, 1, 4], dtype=torch.int32), 2)


def test_the_first_layer_plans_for_all() -> None:
    """A graph captured with the planning in it follows the lengths it finds when it is replayed."""
    problem = make_problem([1, 1], h_q=HEADS)
    decode = build_decode(problem, 1)
    problem.seq_lens.copy_(torch.tensor([64, 3]))
    planned = decode.plan(num_pages=len(problem.kv_cache))
    assert planned.items[: planned.part_offsets[-1], :3].tolist() == [[0, 0, 1], [1, 0, 1]]
    assert decode.plan(num_pages=len(problem.kv_cache)) is planned


def test_steps_of_one_shape_share_their_buffers() -> None:
    planner = StepPlanner(torch.device("cpu"), h_q=HEADS, page_size=64, longest_query=2)
    problems = [make_problem(lengths, s_q=s_q, h_q=HEADS) for lengths, s_q in (([7, 900], 1), ([5], 1), ([7, 900], 2))]
    first, again = (
        [build_decode(p, p.q.shape[1], planner).plan(num_pages=len(p.kv_cache)) for p in problems] for _ in range(2)
    )
    addresses = [[t.data_ptr() for t in (p.items, p.part_offsets, p.split_offsets)] for p in first]
    assert addresses == [[t.data_ptr() for t in (p.items, p.part_offsets, p.split_offsets)] for p in again]
    assert len({address for three in addresses for address in three}) == 9


def test_faults_are_logged_and_the_engine_goes_on(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """FLASHMLA_CHECK_BOUNDS=1: raised in `build`, they would end vLLM's engine core."""
    monkeypatch.setenv(bounds.VARIABLE, "1")
    planner = StepPlanner(torch.device("cpu"), h_q=HEADS, page_size=64, longest_query=1)
    problem = make_problem([63, 64, 200], h_q=HEADS, dtype=torch.float32)
    entry = int(problem.block_table[2, 1])

    def step() -> tuple[torch.Tensor, torch.Tensor]:
        metadata = SimpleNamespace(num_decodes=3, decode=build_decode(problem, 1, planner))
        result: tuple[torch.Tensor, torch.Tensor] = impl().forward_mqa(
            problem.q.flatten(0, 1), problem.kv_cache.squeeze(2), metadata, layer=None
        )
        return result

    problem.block_table[2, 1] = -1
    out, lse = step()
    assert not out[2].any() and torch.all(lse[2] == float("-inf")) and out[:2].any()
    problem.block_table[2, 1] = entry
    with caplog.at_level(logging.ERROR, "flashmla_backend.integration.planner"):
        out, lse = step()
        step()
    (record,) = caplog.records
    assert "block_table[2, 1] was -1; accepted: 0 to" in record.getMessage()
    expected_out, expected_lse = reference.mla_decode(
        problem.q, problem.kv_cache, problem.block_table, problem.seq_lens, softmax_scale=SCALE
    )
    check_close(out, lse, expected_out.flatten(0, 1), expected_lse.flatten(0, 1))


@pytest.mark.parametrize("variable", [None, BATCH_INVARIANT_VARIABLE, "VLLM_BATCH_INVARIANT"])
def test_batch_invariance_is_what_vllm_or_we_are_asked_for(
    variable: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in (BATCH_INVARIANT_VARIABLE, "VLLM_BATCH_INVARIANT"):
        monkeypatch.setenv(name, str(int(name == variable)))

    def bare(builder: Any, *_: Any) -> None:
        builder.num_heads, builder.dcp_world_size, builder.page_size = HEADS, 1, 64

    monkeypatch.setattr(MLACommonMetadataBuilder, "__init__", bare)
    builder = FlashMLAMetadataBuilder(None, [], None, torch.device("cpu"))
    problem = make_problem([64, 3], h_q=HEADS)
    plan = builder.planner.step(problem.seq_lens, problem.block_table, 1)()
    assert plan.batch_invariant == (variable is not None)
    # How queries are cut must not depend on what else is in the step.
    invariant = (1, QueryLenSupport.UNIFORM)
    free = (SHORT_PREFILL, QueryLenSupport.VARLEN)
    assert (builder.reorder_batch_threshold, builder.query_len_support) == (invariant if variable else free)
    assert FlashMLABackend.supports_batch_invariance()  # or vLLM's selector passes us over


@pytest.mark.parametrize("lengths", [[1, 2, 3, 70, 300], [1, 1, 1]], ids=["some shards empty", "all but one empty"])
def test_ranks_of_a_context_merge_by_their_lse(lengths: list[int]) -> None:
    """DCP: rank r of 3 holds every third token and decodes all heads over them; shards may be empty."""
    ranks = 3
    whole = make_problem(lengths, h_q=HEADS, dtype=torch.float32)
    tokens = [
        torch.cat([whole.kv_cache[page].squeeze(1) for page in row[: -(-length // 64)].tolist()])[:length]
        for row, length in zip(whole.block_table, lengths, strict=True)
    ]
    outs, lses = [], []
    for rank in range(ranks):
        shard = make_problem([len(t[rank::ranks]) for t in tokens], h_q=HEADS, dtype=torch.float32)
        for request, own in enumerate(t[rank::ranks] for t in tokens):
            for begin in range(0, len(own), 64):
                rows = own[begin : begin + 64]
                shard.kv_cache[shard.block_table[request, begin // 64], : len(rows), 0] = rows
        metadata = SimpleNamespace(num_decodes=len(lengths), decode=build_decode(shard, 1))
        out, lse = impl().forward_mqa(whole.q.flatten(0, 1), shard.kv_cache.squeeze(2), metadata, layer=None)
        empty = shard.seq_lens == 0
        assert torch.all(out[empty] == 0) and torch.all(lse[empty] == float("-inf"))
        outs.append(out)
        lses.append(lse)
    total = torch.logsumexp(torch.stack(lses), 0)
    merged = sum(out * (lse - total).exp()[..., None] for out, lse in zip(outs, lses, strict=True))
    expected_out, expected_lse = reference.mla_decode(
        whole.q, whole.kv_cache, whole.block_table, whole.seq_lens, softmax_scale=SCALE
    )
    check_close(merged, total, expected_out.flatten(0, 1), expected_lse.flatten(0, 1))


@pytest.mark.parametrize("in_parts", [True, False], ids=["tuple", "tensor"])
@pytest.mark.parametrize("apart", [False, True], ids=["dense pages", "pages apart"])
@pytest.mark.parametrize("s_q", [1, 3])
def test_decode_against_the_oracle(s_q: int, apart: bool, in_parts: bool) -> None:
    problem = make_problem([63, 64, 0, 65, 200], s_q=s_q, h_q=HEADS, dtype=torch.float32)
    cache = problem.kv_cache.squeeze(2)  # vLLM's [P, 64, 576]
    q = problem.q.flatten(0, 1)  # [T, N, 576]
    metadata = SimpleNamespace(num_decodes=5, decode=build_decode(problem, s_q))
    out, lse = impl().forward_mqa(
        q.split([512, 64], dim=-1) if in_parts else q,
        spread_pages(cache) if apart else cache,
        metadata,
        layer=None,
    )
    expected_out, expected_lse = reference.mla_decode(
        problem.q, problem.kv_cache, problem.block_table, problem.seq_lens, softmax_scale=SCALE
    )
    assert out.shape == (5 * s_q, HEADS, 512)
    assert lse.shape == (5 * s_q, HEADS)
    check_close(out, lse, expected_out.flatten(0, 1), expected_lse.flatten(0, 1))


@pytest.mark.parametrize("newer", [(), (False,)], ids=["0.26", "0.33"])
@pytest.mark.parametrize("apart", [False, True], ids=["dense pages", "pages apart"])
def test_cache_rows_are_written_where_the_slots_say(apart: bool, newer: tuple[bool, ...]) -> None:
    cache = torch.zeros(4, 64, 576)
    if apart:
        cache = spread_pages(cache)
    slots = torch.tensor([3 * 64 + 63, -1, 0, 64, -1])
    latent, rope = torch.randn(7, 512), torch.randn(7, 1, 64)  # two rows of graph padding without a slot
    impl().do_kv_cache_update(latent, rope, cache, slots, "auto", torch.tensor(1.0), *newer)
    expected = torch.zeros(4, 64, 576)
    for token, (page, row) in {0: (3, 63), 2: (0, 0), 3: (1, 0)}.items():
        expected[page, row] = torch.cat([latent[token], rope[token, 0]])
    assert torch.equal(cache, expected)


def test_cache_not_allocated_yet_is_left_alone() -> None:
    impl().do_kv_cache_update(
        torch.zeros(2, 512), torch.zeros(2, 1, 64), torch.tensor([]), torch.tensor([0, 1]), "auto", None
    )


@pytest.mark.parametrize(
    "unserved",
    [
        {"sliding_window": 128},
        {"logits_soft_cap": 30.0},
        {"alibi_slopes": [0.5]},
        {"attn_type": AttentionType.ENCODER},
    ],
    ids=str,
)
def test_layers_with_more_than_plain_attention_are_refused(unserved: dict[str, Any]) -> None:
    plain: dict[str, Any] = {
        "num_heads": HEADS,
        "head_size": 576,
        "scale": SCALE,
        "num_kv_heads": 1,
        "alibi_slopes": None,
        "sliding_window": None,
        "kv_cache_dtype": "auto",
        "logits_soft_cap": None,
        "attn_type": AttentionType.DECODER,
        "kv_sharing_target_layer_name": None,
    }
    (name,) = unserved
    with pytest.raises(Unsupported, match=f"asks for {name}=.*drop --attention-backend flashmla"):
        FlashMLAImpl.__init__(impl(), **plain | unserved)


def test_what_the_backend_declares() -> None:
    assert FlashMLABackend.get_supported_kernel_block_sizes() == [16, 32, 64]
    assert FlashMLABackend.get_supported_kernel_block_sizes(kv_cache_spec=None) == [16, 32, 64]
    assert FlashMLABackend.get_supported_head_sizes() == [576]
    assert FlashMLABackend.get_preferred_block_size(128) == 64
    split_into = {16: 16, 32: 32, 48: 16, 64: 64, 96: 32, 128: 64, 256: 64}
    assert [size for size in (1, 8, *split_into, 100) if FlashMLABackend.supports_block_size(size)] == [*split_into]
    for size, page_size in split_into.items():
        assert select_common_block_size(size, [FlashMLABackend]) == page_size
    assert FlashMLABackend.get_builder_cls()._cudagraph_support is AttentionCGSupport.UNIFORM_BATCH
    assert FlashMLABackend.get_builder_cls().query_len_support is QueryLenSupport.VARLEN
    assert FlashMLABackend.get_impl_cls().can_return_lse_for_decode
    assert FlashMLABackend.get_impl_cls().supports_dcp
