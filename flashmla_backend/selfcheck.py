"""A decode with a known answer, for engines to run once when they start: a wrong kernel should not serve anybody."""

from __future__ import annotations

import torch

from flashmla_backend.api import mla_decode, plan_decode
from flashmla_backend.errors import Unsupported
from flashmla_backend.paging import D_QK
from flashmla_backend.reference import mla_decode as reference
from flashmla_backend.schedule import TILE_TOKENS

LENGTHS = (TILE_TOKENS + 6, 1)
SCALE = D_QK**-0.5
ABSOLUTE, RELATIVE = 8e-4, 2.01 / 128  # of a cache of deviation 0.1: 16-bit probabilities round at its scale


def check_decode(device: torch.device, dtype: torch.dtype, h_q: int) -> None:
    """Decode two small requests on `device` and compare with the oracle. Waits for the device.

    Raises:
        Unsupported: the outputs differ.
        InvalidArgument: the device has no decode for this dtype.
    """
    generator = torch.Generator().manual_seed(0)
    tables = torch.tensor([[2, 0], [1, 0]], dtype=torch.int32)
    seq_lens = torch.tensor(LENGTHS, dtype=torch.int32)
    q = torch.randn(2, 1, h_q, D_QK, generator=generator).to(dtype)
    cache = (torch.randn(3, TILE_TOKENS, 1, D_QK, generator=generator) / 10).to(dtype)
    plan = plan_decode(seq_lens.to(device), tables.to(device), s_q=1, h_q=h_q, num_pages=len(cache))
    out, _ = mla_decode(q.to(device), cache.to(device), plan, softmax_scale=SCALE)
    expected, _ = reference(q, cache, tables, seq_lens, softmax_scale=SCALE)
    error = (out.cpu().double() - expected).abs()
    if not bool((error <= ABSOLUTE + RELATIVE * expected.abs()).all()):
        raise Unsupported(
            f"the decode on {device} is wrong: {h_q} heads in {dtype} are off by up to {float(error.max()):.3g}; "
            "reinstall flashmla_backend on this machine, or set FLASHMLA_BACKEND_DISABLE=1"
        )
