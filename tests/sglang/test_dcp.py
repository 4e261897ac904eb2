"""Decode with a cache shared out among ranks (DCP), rank after rank in one process; test_tokens.py has real ranks.

Every rank has a pool of its own, with NaN in each row that it was not given; the outputs are merged by their LSE.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang.srt.layers.dcp.layout import get_dcp_lens
from sglang.srt.model_executor.forward_batch_info import ForwardMode
from sglang.test.kits.attention_unittest.attention_methods import mla_attention as kit

from flashmla_backend.errors import InvalidArgument
from flashmla_backend.integration.sglang import compat
from flashmla_backend.integration.sglang.dcp import Share

from .test_kit import SHAPE, NothingMaySkip, case
from .test_steps import step_buffers

LENGTHS = (1, 2, 63, 64, 65, 129, 300)  # the new token included
HEADS = 16  # of one rank


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_lengths_are_those_of_sglang(ranks: int) -> None:
    lengths = torch.arange(300, dtype=torch.int32)
    for rank in range(ranks):
        ours = lengths.clone()
        Share(rank, ranks).lengths_(ours)
        assert torch.equal(ours, get_dcp_lens(lengths, ranks, rank))


def token_table(lengths: tuple[int, ...], page_slots: int) -> torch.Tensor:
    """[requests, 301] int32 as SGLang fills it, from pages in random order; rubbish after a request's last token."""
    pages = iter(torch.randperm(50, generator=torch.Generator().manual_seed(0)).tolist())
    table = torch.full((len(lengths), 301), -7, dtype=torch.int32)
    for request, length in enumerate(lengths):
        for first in range(0, length, page_slots):
            count = min(page_slots, length - first)
            table[request, first : first + count] = next(pages) * page_slots + torch.arange(count)
    return table


def merged(shares: list[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
    """Outputs [T, H, 512] of ranks by their natural LSE [T, H], in fp32."""
    outs, lses = (torch.stack(parts).float() for parts in zip(*shares, strict=True))
    return (outs * lses.softmax(dim=0).unsqueeze(-1)).sum(dim=0)


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("page_size, tile", [(16, 16), (64, 64), (128, 64)])
def test_tables_lead_to_the_rows_of_a_rank(page_size: int, tile: int, ranks: int) -> None:
    all_lengths = (0, *LENGTHS)
    table = token_table(all_lengths, page_size * ranks)
    requests, lengths = torch.arange(len(all_lengths)), torch.tensor(all_lengths)
    for rank in range(ranks):
        share = Share(rank, ranks)
        plan = step_buffers(table, rows=8, page_size=tile, share=share).plan(requests, lengths, added=0, s_q=1)
        for request, length in enumerate(all_lengths):
            own = table[request, rank:length:ranks]
            local = torch.arange(len(own))
            assert plan.seq_lens[request] == len(own) and bool((own % ranks == rank).all())
            assert torch.equal(plan.block_table[request, local // tile] * tile + local % tile, own // ranks)


def test_pages_are_of_all_ranks() -> None:
    """A table of an allocator that does not widen its pages is noticed."""
    buffers = step_buffers(token_table((300,), 64), rows=4, share=Share(0, 2))
    with pytest.raises(InvalidArgument, match=r"pages of 128 consecutive slots.*--page-size 64"):
        buffers.plan(torch.tensor([0]), torch.tensor([300]), added=0, s_q=1)


def rank_of(monkeypatch: pytest.MonkeyPatch, rank: int, ranks: int, page_size: int) -> Any:
    """The kit's fixture of decoding requests, with the table of a shared cache and our backend as one of its ranks."""
    monkeypatch.setattr(compat, "dcp_share", lambda: Share())
    decode = case(ForwardMode.DECODE, page_size, tuple(length - 1 for length in LENGTHS))
    fixture = kit.build_mla_attention_fixture(NothingMaySkip, decode, **{**SHAPE, "dtype": torch.float32})
    table = token_table(LENGTHS, page_size * ranks)
    fixture.runner.req_to_token_pool.req_to_token[: len(LENGTHS), : table.shape[1]] = table
    last = torch.tensor(LENGTHS) - 1
    fixture.forward_batch.out_cache_loc = table[torch.arange(len(LENGTHS)), last].long()
    monkeypatch.setattr(compat, "dcp_share", lambda: Share(rank, ranks))
    monkeypatch.setattr(fixture.runner, "model", SimpleNamespace(**{compat.GATHERS_FOR_DCP: None}), raising=False)
    fixture.backend = type(fixture.backend)(fixture.runner)
    return fixture


def eager(backend: Any, batch: Any) -> None:
    backend.init_forward_metadata(batch)


def as_captured(backend: Any, batch: Any) -> None:
    backend.init_cuda_graph_state(max_bs=len(LENGTHS), max_num_tokens=len(LENGTHS))
    backend.init_forward_metadata_out_graph(batch, in_capture=True)
    backend.init_forward_metadata_in_graph(batch)
    backend.init_forward_metadata_out_graph(batch)


@pytest.mark.parametrize("plan", [eager, as_captured])
@pytest.mark.parametrize("page_size, ranks", [(16, 2), (64, 2), (64, 4), (128, 2)])
def test_ranks_together_are_one(
    page_size: int, ranks: int, plan: Callable[..., None], registered: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(1)
    q = torch.randn(len(LENGTHS), ranks * HEADS, 576, generator=generator)
    rows = {request: torch.randn(length, 1, 576, generator=generator) for request, length in enumerate(LENGTHS)}
    new = torch.stack([tokens[-1] for tokens in rows.values()])
    shares = []
    for rank in range(ranks):
        fixture = rank_of(monkeypatch, rank, ranks, page_size)
        backend, batch, layer = fixture.backend, fixture.forward_batch, fixture.actual_module.attn_mqa
        table = fixture.runner.req_to_token_pool.req_to_token
        cache = backend.token_to_kv_pool.get_key_buffer(layer.layer_id)
        cache.fill_(float("nan"))
        for request, tokens in rows.items():
            cache[table[request, rank : len(tokens) - 1 : ranks].long() // ranks] = tokens[rank:-1:ranks]
        plan(backend, batch)
        # As SGLang hands them over: queries of all ranks, heads outermost in memory.
        by_heads = q.transpose(0, 1).contiguous().transpose(0, 1)
        parts = {"q_rope": by_heads[..., 512:], "k_rope": new[..., 512:]}
        out, lse = backend.forward_decode(by_heads[..., :512], new[..., :512], None, layer, batch, **parts)
        owned = torch.tensor([len(tokens[rank::ranks]) for tokens in rows.values()])
        assert out.shape == (len(LENGTHS), ranks * HEADS * 512) and lse.shape == q.shape[:2]
        assert not out[owned == 0].any() and torch.equal(lse.isneginf().all(dim=1), owned == 0)
        assert int((~cache.isnan().any(dim=-1)).sum()) == int(owned.sum()), "rows of other ranks were written"
        shares.append((out.view(*q.shape[:2], 512), lse))

    expected = [
        (torch.einsum("hd,td->ht", q[request], tokens[:, 0]) * layer.scaling).softmax(dim=-1) @ tokens[:, 0, :512]
        for request, tokens in rows.items()
    ]
    torch.testing.assert_close(merged(shares), torch.stack(expected), atol=2e-5, rtol=1e-4)


def test_rows_added_after_planning_weigh_nothing(registered: None, monkeypatch: pytest.MonkeyPatch) -> None:
    fixture = rank_of(monkeypatch, 0, 2, 64)
    fixture.backend.init_forward_metadata(fixture.forward_batch)
    q = torch.randn(len(LENGTHS) + 2, 2 * HEADS * 576)
    out, lse = fixture.backend.forward_decode(q, None, None, fixture.actual_module.attn_mqa, fixture.forward_batch)
    assert len(out) == len(lse) == len(q) and not out[-2:].any() and not lse[-2:].any()
