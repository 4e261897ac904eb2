"""The traditional forms agree with each other, with the oracle and with the product."""

from __future__ import annotations

import pytest
import torch

import flashmla_backend
from flashmla_backend import baselines, reference

HEADS, D_NOPE, D_VALUE = 4, 128, 128
SCALE = (D_NOPE + 64) ** -0.5


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("s_q, length", [(1, 1), (1, 200), (3, 130), (4, 4), (130, 130)])
def test_all_forms_agree(s_q: int, length: int, causal: bool) -> None:
    torch.manual_seed(length)
    q_nope, q_rope = torch.randn(s_q, HEADS, D_NOPE).double(), torch.randn(s_q, HEADS, 64).double()
    latent, k_rope = torch.randn(length, 512).double(), torch.randn(length, 64).double()
    w_uk = torch.randn(HEADS, D_NOPE, 512).double() / 512**0.5
    w_uv = torch.randn(HEADS, 512, D_VALUE).double() / 512**0.5

    expanded = baselines.expanded_mha(q_nope, q_rope, latent, k_rope, w_uk, w_uv, SCALE, causal)
    q = baselines.absorb_query(q_nope, q_rope, w_uk)
    kv = torch.cat([latent, k_rope], dim=-1)
    out, lse = baselines.absorbed(q, kv, SCALE, causal)
    torch.testing.assert_close(torch.einsum("shc,hcv->shv", out, w_uv), expanded)

    for chunk_tokens in (1, 64, 1000):
        for ours, expected in zip(baselines.chunked(q, kv, SCALE, causal, chunk_tokens), (out, lse), strict=True):
            torch.testing.assert_close(ours, expected)

    pages = -(-length // 64)
    cache = torch.zeros(pages * 64, 576, dtype=torch.double)
    cache[:length] = kv
    cache = cache.view(pages, 64, 1, 576)
    table = torch.arange(pages, dtype=torch.int32)[None]
    lengths = torch.tensor([length], dtype=torch.int32)
    oracle = reference.mla_decode(q[None], cache, table, lengths, softmax_scale=SCALE, causal=causal)
    torch.testing.assert_close(oracle[0][0], out)
    torch.testing.assert_close(oracle[1][0], lse)

    plan = flashmla_backend.plan_decode(lengths, table, s_q=s_q, h_q=HEADS, causal=causal, num_sms=8)
    product = flashmla_backend.mla_decode(q[None].float(), cache.float(), plan, softmax_scale=SCALE)
    torch.testing.assert_close(product[0][0].double(), out, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(product[1][0].double(), lse, atol=1e-5, rtol=1e-5)
