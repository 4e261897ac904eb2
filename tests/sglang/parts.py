"""Queries and new rows handed over in two parts do what they do in one; for test_backend.py and kit_on_gpu.py."""

from __future__ import annotations

from typing import Any

import torch


@torch.no_grad()
def check_parts(fixture: Any) -> None:
    """fixture: the kit's, of decoding requests. Compares outputs and caches bit for bit."""
    backend, batch, layer = fixture.backend, fixture.forward_batch, fixture.actual_module.attn_mqa
    backend.init_forward_metadata(batch)
    cache, slots = backend.token_to_kv_pool.get_key_buffer(layer.layer_id), batch.out_cache_loc
    generator = torch.Generator().manual_seed(0)
    shapes = (slots.numel(), layer.tp_q_head_num, 576), (slots.numel(), 1, 576)
    q, k = (torch.randn(shape, generator=generator).to(cache) for shape in shapes)
    whole = backend.forward_decode(q.flatten(1), k, k[..., :512], layer, batch)
    written = cache.clone()
    cache[slots] = 0

    # As SGLang makes the latent part: heads outermost in memory.
    latent = q[..., :512].transpose(0, 1).contiguous().transpose(0, 1)
    parts = {"q_rope": q[..., 512:], "k_rope": k[..., 512:]}
    apart = backend.forward_decode(latent, k[..., :512], k[..., :512], layer, batch, **parts)
    assert torch.equal(cache[slots], k) and torch.equal(cache, written), "the cache differs"
    assert torch.equal(apart, whole) and bool(whole.any()), "the outputs differ"
