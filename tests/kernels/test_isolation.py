"""Isolation between requests, bit for bit, with everything around them filled: see tests/isolation.py."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch

from tests.isolation import MODES, Variant, leaks, own_nan
from tests.kernels.problems import DTYPES


@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize("s_q", [1, 2, 3, 4])
@pytest.mark.parametrize(
    "page_size, dtype", [(16, torch.bfloat16), (32, torch.float16), *itertools.product((64, 128, 256), DTYPES)]
)
def test_nothing_leaks(
    page_size: int,
    dtype: torch.dtype,
    s_q: int,
    mode: dict[str, object],
    record_property: Callable[[str, object], None],
) -> None:
    cases, faults = 0, []
    for causal in (True, False):
        for h_q, h_kv in ((16, 1), (20, 2), (128, 1)):
            variant = Variant(page_size, dtype, s_q, causal, h_q, h_kv)
            tried, found = leaks(variant, mode, "cuda")
            cases += tried
            faults += [f"{variant}: {fault}" for fault in found]
    record_property("cases", cases)
    assert not faults


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_a_requests_own_nan_shows(mode: dict[str, object]) -> None:
    assert own_nan(mode, "cuda") == []
