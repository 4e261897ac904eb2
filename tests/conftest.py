"""Shared builders: a paged cache in which everything a request does not own is poison."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

import flashmla_backend

SCALE = 576**-0.5
POISON_PAGE = 2147480000  # an id no cache has: following it is an out-of-bounds read


@dataclass
class Problem:
    q: torch.Tensor  # [B, S_q, H_q, 576]
    kv_cache: torch.Tensor  # [P, page_size, H_kv, 576], NaN wherever no request has written
    block_table: torch.Tensor  # [B, W] int32, POISON_PAGE past each request's last page
    seq_lens: torch.Tensor  # [B] int32


def make_problem(
    lengths: list[int],
    *,
    s_q: int = 1,
    h_q: int = 16,
    h_kv: int = 1,
    page_size: int = 64,
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
) -> Problem:
    """Random data in shuffled pages; NaN in unused rows and pages, POISON_PAGE in unused table entries."""
    generator = torch.Generator().manual_seed(seed)
    used = [-(-length // page_size) for length in lengths]
    width = max([*used, 1]) + 2
    num_pages = sum(used) + 3
    ids = torch.randperm(num_pages, generator=generator)
    kv_cache = torch.full((num_pages, page_size, h_kv, 576), float("nan"), dtype=dtype)
    block_table = torch.full((len(lengths), width), POISON_PAGE, dtype=torch.int32)
    first = 0
    for request, (length, pages) in enumerate(zip(lengths, used, strict=True)):
        own = ids[first : first + pages]
        first += pages
        block_table[request, :pages] = own.int()
        tokens = torch.randn(length, h_kv, 576, generator=generator).to(dtype)
        for slot, page in enumerate(own.tolist()):
            rows = tokens[slot * page_size : (slot + 1) * page_size]
            kv_cache[page, : len(rows)] = rows
    q = torch.randn(len(lengths), s_q, h_q, 576, generator=generator).to(dtype)
    return Problem(q, kv_cache, block_table, torch.tensor(lengths, dtype=torch.int32))


def decode(problem: Problem, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Out and LSE of a plan of its own. options: more of `plan_decode`'s."""
    plan = flashmla_backend.plan_decode(
        problem.seq_lens,
        problem.block_table,
        s_q=problem.q.shape[1],
        h_q=problem.q.shape[2],
        h_kv=problem.kv_cache.shape[2],
        page_size=problem.kv_cache.shape[1],
        **options,
    )
    return flashmla_backend.mla_decode(problem.q, problem.kv_cache, plan, softmax_scale=SCALE)


def check_close(out: torch.Tensor, lse: torch.Tensor, expected_out: torch.Tensor, expected_lse: torch.Tensor) -> None:
    """FlashMLA's own bounds: out within 8e-4 or 2.01/128 relative and a cosine difference of 5e-6; lse within 1e-6 or
    8.01/65536 relative; infinities in the same places, NaN nowhere."""
    assert not out.isnan().any() and not lse.isnan().any()
    assert torch.equal(lse.isinf(), expected_lse.isinf())
    close(out.double(), expected_out, absolute=8e-4, relative=2.01 / 128)
    finite = expected_lse.isfinite()
    close(lse[finite].double(), expected_lse[finite], absolute=1e-6, relative=8.01 / 65536)
    x, y = out.double().flatten(), expected_out.flatten()
    if y.norm() > 0:
        assert 1 - 2 * (x @ y) / (x @ x + y @ y) < 5e-6


def close(x: torch.Tensor, y: torch.Tensor, *, absolute: float, relative: float) -> None:
    error = (x - y).abs()
    wrong = (error > absolute) & (error > relative * y.abs())
    if wrong.any():
        worst = int(error.masked_fill(~wrong, 0).argmax())
        pytest.fail(
            f"{int(wrong.sum())} of {x.numel()} values out of bounds, worst at {worst}: "
            f"{x.flatten()[worst]:.6g} instead of {y.flatten()[worst]:.6g}"
        )


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Any]]:
    """Runs a command of `flashmla bench` with an engine on the CPU and returns its report, that of `tmp_path`."""
    from typer.testing import CliRunner

    from flashmla_backend.cli import app

    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("FLASHMLA_BACKEND_CACHE", str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(Path.cwd()), os.environ.get("PYTHONPATH", "")]))

    def run(command: str, **options: object) -> dict[str, Any]:
        words = ["bench", command, "--logs", str(tmp_path), "--out", str(tmp_path / "report.json")]
        for name, value in options.items():
            words += [f"--{name.replace('_', '-')}", str(value)]
        result = CliRunner().invoke(app, words)
        assert result.exit_code == 0, result.output
        made: dict[str, Any] = json.loads((tmp_path / "report.json").read_text())
        return made

    return run
