"""Steps that the kit has no CPU cases for: draft steps, rows of padding, self-check, capture and replay."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from sglang.srt.model_executor.forward_batch_info import ForwardMode
from sglang.test.kits.attention_unittest.attention_methods import mla_attention as kit

from flashmla_backend import selfcheck
from flashmla_backend.errors import Unsupported
from flashmla_backend.integration.sglang import draft

from .parts import check_parts
from .test_kit import SHAPE, NothingMaySkip, case

HEADS, PREFIXES = 16, (61, 64, 300)


@pytest.fixture
def fixture(registered: None) -> Any:
    """The kit's pools, layer and batch of three decoding requests."""
    return kit.build_mla_attention_fixture(NothingMaySkip, case(ForwardMode.DECODE, 64, PREFIXES), **SHAPE)


def test_each_draft_step_attends_to_the_drafts_before_it(fixture: Any) -> None:
    backend = draft.FlashMLAMultiStepDraftBackend(fixture.runner, topk=1, speculative_num_steps=4)
    committed = [prefix + 1 for prefix in PREFIXES]
    for request, length in enumerate(committed):  # slots of the drafts, as SGLang allocates them
        table = fixture.runner.req_to_token_pool.req_to_token[request]
        for token in range(length, length + 3):
            table[token] = table[token - 1] + 1 if token % 64 else 64 * (100 + request)
    backend.init_forward_metadata(fixture.forward_batch)
    lengths = [step.forward_metadata.seq_lens.tolist() for step in backend.attn_backends]
    assert lengths == [[length + step + 1 for length in committed] for step in range(3)]
    assert not backend.needs_cpu_seq_lens


def attend(fixture: Any, rows: int) -> torch.Tensor:
    layer = fixture.actual_module.attn_mqa
    q = torch.randn(rows, HEADS * 576, generator=torch.Generator().manual_seed(0)).to(SHAPE["dtype"])
    out: torch.Tensor = fixture.backend.forward_decode(q, None, None, layer, fixture.forward_batch)
    return out


def test_queries_and_rows_in_two_parts(fixture: Any) -> None:
    check_parts(fixture)


def test_parts_of_prompts_are_joined(registered: None) -> None:
    prompts = case(ForwardMode.EXTEND, 64, (0, 63, 130), (5, 2, 70))
    fixture = kit.build_mla_attention_fixture(NothingMaySkip, prompts, **SHAPE)
    backend, batch, layer = fixture.backend, fixture.forward_batch, fixture.actual_module.attn_mqa
    backend.init_forward_metadata(batch)
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(77, heads, 576, generator=generator).to(SHAPE["dtype"]) for heads in (HEADS, 1))
    whole = backend.forward_extend(q, k, k[..., :512], layer, batch)
    parts = {"q_rope": q[..., 512:], "k_rope": k[..., 512:]}
    apart = backend.forward_extend(q[..., :512], k[..., :512], k[..., :512], layer, batch, **parts)
    assert torch.equal(apart, whole) and whole.any()


def test_queries_come_whole_where_sglang_scales_only_those(fixture: Any) -> None:
    from sglang.srt.models.deepseek_common.utils import FORWARD_ABSORB_CORE_ATTENTION_BACKENDS as GIVEN_PARTS

    assert "flashmla" in GIVEN_PARTS
    fixture.runner.model_config.hf_text_config.llama_4_scaling = {"beta": 0.1}
    type(fixture.backend)(fixture.runner)
    assert "flashmla" not in GIVEN_PARTS


def test_rows_added_after_planning_are_zero(fixture: Any) -> None:
    fixture.backend.init_forward_metadata(fixture.forward_batch)
    exact, padded = attend(fixture, 3), attend(fixture, 5)
    assert torch.equal(padded[:3], exact) and exact.abs().sum() > 0
    assert padded.shape == (5, HEADS * 512) and not padded[3:].any()


def test_an_idle_rank_plans_nothing(fixture: Any) -> None:
    batch = fixture.forward_batch
    batch.forward_mode, batch.batch_size = ForwardMode.IDLE, 0
    fixture.backend.init_forward_metadata(batch)
    assert fixture.backend.forward_metadata is None


def test_graphs_find_their_buffers_where_they_were_captured(fixture: Any) -> None:
    backend, batch = fixture.backend, fixture.forward_batch
    backend.init_cuda_graph_state(max_bs=3, max_num_tokens=3)

    def plan_in_graph(size: int) -> list[int]:
        batch.batch_size = size
        backend.init_forward_metadata_in_graph(batch)
        plan = backend.forward_metadata
        assert plan.batch == size
        return [tensor.data_ptr() for tensor in (plan.seq_lens, plan.block_table, plan.items, plan.partial_out)]

    captured = {}
    for size in (3, 1, 2):
        batch.batch_size = size
        backend.init_forward_metadata_out_graph(batch, in_capture=True)
        captured[size] = plan_in_graph(size)
    batch.batch_size = 3
    backend.init_forward_metadata(batch)  # a step without a graph in between
    backend.init_cuda_graph_state(max_bs=1, max_num_tokens=1)  # another runner's: captured graphs stay valid
    assert {size: plan_in_graph(size) for size in captured} == captured
    assert len({buffers[0] for buffers in captured.values()}) == 1


def test_a_wrong_decode_is_noticed_at_the_start(fixture: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def off_by_a_little(*arguments: Any, **more: Any) -> tuple[torch.Tensor, torch.Tensor]:
        out, lse = selfcheck.reference(*arguments, **more)
        return out * 1.02, lse

    cpu, dtype = torch.device("cpu"), torch.bfloat16
    selfcheck.check_decode(cpu, dtype, HEADS)
    monkeypatch.setattr(
        selfcheck,
        "mla_decode",
        lambda q, cache, plan, softmax_scale: off_by_a_little(
            q, cache, plan.block_table, plan.seq_lens, softmax_scale=softmax_scale
        ),
    )
    with pytest.raises(Unsupported, match=r"the decode on cpu is wrong: 16 heads.*FLASHMLA_BACKEND_DISABLE=1"):
        selfcheck.check_decode(cpu, dtype, HEADS)
