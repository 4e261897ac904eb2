"""SGLang's own MLA attention kit against our backend: real pools and layers, shuffled pages, a reference in fp32.

The kit turns some errors of a backend's constructor into skips; here nothing may be skipped. On the CPU its CUDA graph
cases prepare metadata as capture and replay do, padded rows included, and call the layers without a graph.
"""

from __future__ import annotations

from typing import Any, NoReturn

import pytest
import torch
from sglang.srt.model_executor.forward_batch_info import ForwardMode
from sglang.test.kits.attention_unittest.attention_methods import mla_attention as kit
from sglang.test.kits.attention_unittest.runner_modes import (
    cuda_graph_decode_runner,
    speculative_draft_extend_runner,
    speculative_target_verify_runner,
)

from flashmla_backend.integration.sglang import plugin

SHAPE: dict[str, Any] = {
    "kv_lora_rank": 512,
    "qk_rope_head_dim": 64,
    "max_context_len": 1024,
    "dtype": torch.bfloat16,
    "device": "cpu",
}
PAGE_SIZES = (16, 64, 128)
ROWS = 4  # of captured batches; the replayed ones have fewer requests
DRAFTS = 4


class NothingMaySkip:
    @staticmethod
    def skipTest(reason: str) -> NoReturn:  # the name is unittest's
        pytest.fail(f"the kit skipped: {reason}")


@pytest.fixture(autouse=True)
def ours(registered: None) -> None:
    assert plugin.owns_flashmla()


def case(mode: ForwardMode, page_size: int, prefixes: tuple[int, ...], inputs: tuple[int, ...] = ()) -> Any:
    return kit.MLAAttentionCase(
        name=f"{mode.name} of pages of {page_size}",
        backend="flashmla",
        forward_mode=mode,
        num_heads=16,
        page_size=page_size,
        prefix_lens=prefixes,
        extend_lens=inputs,
    )


@pytest.mark.parametrize("page_size", PAGE_SIZES)
@pytest.mark.parametrize(
    ("prefixes", "inputs"),
    [((0, 0), (64, 191)), ((0, 63, 64, 128), (65, 2, 70, 1)), ((500,), (3,))],
    ids=["no prefix", "mixed", "one"],
)
def test_prompts(page_size: int, prefixes: tuple[int, ...], inputs: tuple[int, ...]) -> None:
    kit.run_mla_attention_case(NothingMaySkip, case(ForwardMode.EXTEND, page_size, prefixes, inputs), **SHAPE)


@pytest.mark.parametrize("page_size", PAGE_SIZES)
@pytest.mark.parametrize("prefixes", [(0, 1, 62, 63, 64, 127, 128, 200, 777), (500,)], ids=["mixed", "one"])
def test_decode(page_size: int, prefixes: tuple[int, ...]) -> None:
    kit.run_mla_attention_case(NothingMaySkip, case(ForwardMode.DECODE, page_size, prefixes), **SHAPE)


@pytest.mark.parametrize("page_size", PAGE_SIZES)
def test_the_kits_own_cases(page_size: int) -> None:
    from dataclasses import replace

    cases = kit.make_mla_cases("flashmla")
    assert cases
    for made in cases:
        kit.run_mla_attention_case(NothingMaySkip, replace(made, page_size=page_size), **SHAPE)


@pytest.mark.parametrize("page_size", PAGE_SIZES)
def test_decode_with_metadata_of_cuda_graphs(page_size: int) -> None:
    cuda_graph_decode_runner.run_mla_cuda_graph_decode_case(
        NothingMaySkip,
        case(ForwardMode.DECODE, page_size, (63, 64, 300)),
        cuda_graph_capture_batch_size=ROWS,
        **SHAPE,
    )


@pytest.mark.parametrize("page_size", PAGE_SIZES)
def test_verification_of_a_chain(page_size: int) -> None:
    drafts = case(ForwardMode.TARGET_VERIFY, page_size, (1, 61, 64, 300), (DRAFTS,) * 4)
    speculative_target_verify_runner.run_mla_eagle_verify_case(NothingMaySkip, drafts, topk=1, **SHAPE)


@pytest.mark.parametrize("page_size", PAGE_SIZES)
def test_verification_with_metadata_of_cuda_graphs(page_size: int) -> None:
    # Here the kit writes prefixes to unshuffled pages as well, over others' if there is more than one.
    drafts = case(ForwardMode.TARGET_VERIFY, page_size, (30, 61), (DRAFTS,) * 2)
    speculative_target_verify_runner.run_mla_eagle_verify_cuda_graph_case(
        NothingMaySkip, drafts, topk=1, cuda_graph_capture_batch_size=ROWS, **SHAPE
    )


@pytest.mark.parametrize("padding", ["small_real", "prod_fill"])
@pytest.mark.parametrize("page_size", PAGE_SIZES)
def test_draft_extension_with_metadata_of_cuda_graphs(page_size: int, padding: str) -> None:
    accepted = case(ForwardMode.DRAFT_EXTEND_V2, page_size, (61, 300), (DRAFTS,) * 2)
    speculative_draft_extend_runner.run_mla_draft_extend_v2_cuda_graph_case(
        NothingMaySkip, accepted, cuda_graph_capture_batch_size=ROWS, pad_style=padding, **SHAPE
    )
