"""The drop-in for DeepSeek's module: both call styles, its argument order, its results."""

from __future__ import annotations

import weakref

import pytest
import torch

from flashmla_backend import InvalidArgument, Unsupported, flash_mla, reference
from flashmla_backend.flash_mla import FlashMLASchedMeta, flash_mla_with_kvcache, get_mla_metadata
from flashmla_backend.workspace import make_workspaces
from tests.conftest import Problem, check_close, make_problem

LENGTHS = [0, 1, 64, 65, 300, 1000]


@pytest.fixture
def problem() -> Problem:
    return make_problem(LENGTHS, s_q=2, h_q=16)


def metadata_of(problem: Problem, style: str) -> tuple:
    if style == "object":
        return get_mla_metadata()
    s_q, h_q, h_kv = problem.q.shape[1], problem.q.shape[2], problem.kv_cache.shape[2]
    return get_mla_metadata(problem.seq_lens, s_q * h_q // h_kv, h_kv)


@pytest.mark.parametrize("style", ["pair", "object"])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("h_q, h_kv", [(16, 1), (128, 1), (6, 2)])
def test_matches_oracle(style: str, causal: bool, h_q: int, h_kv: int) -> None:
    problem = make_problem(LENGTHS, s_q=2, h_q=h_q, h_kv=h_kv)
    metadata, num_splits = metadata_of(problem, style)
    for _ in range(2):  # the second layer reuses what the first one filled
        out, lse = flash_mla_with_kvcache(
            problem.q, problem.kv_cache, problem.block_table, problem.seq_lens, 512, metadata, num_splits, None, causal
        )
    expected_out, expected_lse = reference.mla_decode(
        problem.q, problem.kv_cache, problem.block_table, problem.seq_lens, softmax_scale=576**-0.5, causal=causal
    )
    expected_lse = expected_lse.transpose(1, 2)
    assert lse.shape == (len(LENGTHS), h_q, 2) and lse.is_contiguous()
    assert (lse[0] == float("inf")).all(), "an empty row has lse +inf here"
    check_close(out, lse.where(lse != float("inf"), float("-inf")), expected_out, expected_lse)


def test_explicit_scale_and_out(problem: Problem) -> None:
    metadata, num_splits = metadata_of(problem, "pair")
    buffer = torch.empty(len(LENGTHS), 2, 16, 512, dtype=torch.bfloat16)
    out, _ = flash_mla_with_kvcache(
        q=problem.q,
        k_cache=problem.kv_cache,
        block_table=problem.block_table,
        cache_seqlens=problem.seq_lens,
        head_dim_v=512,
        tile_scheduler_metadata=metadata,
        num_splits=num_splits,
        softmax_scale=0.01,
        causal=True,
        out=buffer,
    )
    expected, _ = reference.mla_decode(
        problem.q, problem.kv_cache, problem.block_table, problem.seq_lens, softmax_scale=0.01
    )
    assert out is buffer
    torch.testing.assert_close(out.double(), expected, atol=8e-4, rtol=2.01 / 128)


def test_pair_has_deepseeks_form_and_fixed_shape() -> None:
    """Engines copy the pair into persistent buffers: shapes may not depend on lengths."""
    shapes = set()
    for lengths in ([0, 0, 0], [1, 2, 3], [100_000, 5, 700]):
        metadata, num_splits = get_mla_metadata(torch.tensor(lengths, dtype=torch.int32), 16, 1)
        assert metadata.dtype == num_splits.dtype == torch.int32 and metadata.shape[1] == 8
        assert num_splits[0] == 0 and (num_splits.diff() >= 1).all()
        shapes.add((metadata.shape, num_splits.shape))
    assert len(shapes) == 1


def test_pair_survives_a_copy_into_persistent_buffers(problem: Problem) -> None:
    metadata, num_splits = metadata_of(problem, "pair")
    buffers = torch.zeros_like(metadata).copy_(metadata), torch.zeros_like(num_splits).copy_(num_splits)
    arguments = problem.q, problem.kv_cache, problem.block_table, problem.seq_lens, 512
    assert torch.equal(
        flash_mla_with_kvcache(*arguments, *buffers)[0], flash_mla_with_kvcache(*arguments, metadata, num_splits)[0]
    )


def workspaces_made(monkeypatch: pytest.MonkeyPatch) -> list[weakref.ref]:
    """Refers to every partial_out that the drop-in allocates from now on."""
    made: list[weakref.ref] = []

    def record(*arguments: object) -> tuple[torch.Tensor, torch.Tensor]:
        workspaces = make_workspaces(*arguments)
        made.append(weakref.ref(workspaces[0]))
        return workspaces

    monkeypatch.setattr(flash_mla, "make_workspaces", record)
    return made


def test_workspaces_are_made_once_per_metadata_storage_and_go_with_it(
    problem: Problem, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = workspaces_made(monkeypatch)
    metadata, num_splits = metadata_of(problem, "pair")
    persistent = torch.cat([metadata, torch.zeros(9, 8, dtype=torch.int32)])
    for _ in range(3):  # layers: each is handed a new view
        call(problem, persistent[: len(metadata)], num_splits)
    assert len(made) == 1 and made[0]() is not None
    wide = make_problem(LENGTHS, s_q=1, h_q=64)  # as many row tiles, more rows
    persistent[: len(metadata)] = metadata_of(wide, "pair")[0]
    call(wide, persistent[: len(metadata)], num_splits)
    call(problem, persistent[: len(metadata)].copy_(metadata), num_splits)
    assert len(made) == 2, "the workspaces of both shapes stay: a captured graph may use either"
    call(problem, metadata, num_splits)
    assert len(made) == 3, "another storage may be used at the same time"
    del metadata, persistent
    assert [workspace() for workspace in made] == [None, None, None]


def call(problem: Problem, metadata: object, num_splits: object, **changes: object) -> object:
    arguments = {
        "q": problem.q,
        "k_cache": problem.kv_cache,
        "block_table": problem.block_table,
        "cache_seqlens": problem.seq_lens,
        "head_dim_v": 512,
        "tile_scheduler_metadata": metadata,
        "num_splits": num_splits,
    }
    return flash_mla_with_kvcache(**(arguments | changes))


def test_bad_input(problem: Problem) -> None:
    pair = metadata_of(problem, "pair")
    with pytest.raises(InvalidArgument, match="head_dim_v is 64; accepted: 512"):
        call(problem, *pair, head_dim_v=64)
    with pytest.raises(InvalidArgument, match="num_splits is None"):
        call(problem, pair[0], None)
    with pytest.raises(InvalidArgument, match=r"tile_scheduler_metadata .* made for other shapes"):
        call(make_problem(LENGTHS[:3], s_q=2, h_q=16), *pair)
    with pytest.raises(InvalidArgument, match=r"q is \[2, 16, 576\]"):
        call(problem, *pair, q=problem.q[0])
    with pytest.raises(InvalidArgument, match=r"out is \[1\] float32"):
        call(problem, *pair, out=torch.empty(1))
    with pytest.raises(InvalidArgument, match="num_q_tokens_per_head_k and num_heads_k are needed"):
        get_mla_metadata(problem.seq_lens)
    with pytest.raises(InvalidArgument, match=r"cache_seqlens is \[6\] int64"):
        get_mla_metadata(problem.seq_lens.long(), 16, 1)


def test_object_is_for_one_step_and_shape(problem: Problem) -> None:
    metadata, _ = get_mla_metadata()
    assert metadata == FlashMLASchedMeta()
    call(problem, metadata, None, causal=True)
    with pytest.raises(InvalidArgument, match="tile_scheduler_metadata was filled by a call with"):
        call(problem, metadata, None, causal=False)
    with pytest.raises(InvalidArgument, match="tile_scheduler_metadata was filled by a call with"):
        call(make_problem(LENGTHS[:3], s_q=2, h_q=16), metadata, None, causal=True)
    with pytest.raises(InvalidArgument, match="plan was made for other lengths"):
        call(make_problem([0, 1, 64, 65, 300, 1100], s_q=2, h_q=16), metadata, None, causal=True)


@pytest.mark.parametrize(
    "name, value",
    [("is_fp8_kvcache", True), ("indices", torch.zeros(1)), ("attn_sink", torch.zeros(1)), ("topk_length", 1)],
)
def test_unsupported_modes_are_refused_by_name(problem: Problem, name: str, value: object) -> None:
    with pytest.raises(Unsupported, match=f"{name} was given"):
        call(problem, *metadata_of(problem, "pair"), **{name: value})
