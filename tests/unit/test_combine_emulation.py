"""Merging pieces in free mode, on the CPU, against fp64."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch

from tests.combine_rows import combined, in_column_order
from tests.emulators import build, needs_compiler

DTYPES = [torch.float16, torch.bfloat16]

pytestmark = needs_compiler


@dataclass
class Pieces:
    """Of a batch: per piece and row."""

    counts: list[int]  # of each request, 0: it was not cut
    rows: int
    values: torch.Tensor  # [pieces, rows, 512] fp16
    lse: torch.Tensor  # [pieces, rows] fp32, -inf where a row saw no token
    scales: torch.Tensor  # [pieces, rows, 2] powers of two, of halves
    heads: int = 0  # of a ragged step: rows of a query token
    queries: tuple[int, ...] = ()  # of a ragged step: query tokens of each request

    def rows_of(self, request: int) -> int:
        return self.heads * self.queries[request] if self.heads else self.rows


@dataclass
class Grid:
    blocks: int
    kernel: int = 4  # words of a lane, or 8: four of them and two thread blocks an SM
    descending: bool = False  # the order in which threads run


Combine = Callable[[Pieces, Grid, torch.dtype], torch.Tensor]


@pytest.fixture(scope="module")
def combine(tmp_path_factory: pytest.TempPathFactory) -> Combine:
    program = build("combine", tmp_path_factory.mktemp("emulation"))

    def run(pieces: Pieces, grid: Grid, dtype: torch.dtype) -> torch.Tensor:
        head = [grid.blocks, grid.kernel, pieces.rows, len(pieces.counts), int(grid.descending)]
        head += [DTYPES.index(dtype), pieces.heads, *pieces.counts, *pieces.queries]
        data = torch.cat([pieces.lse.double()[..., None], pieces.scales.double(), pieces.values.double()], dim=-1)
        return combined(program, head, (" ".join(f"{x:.17g}" for x in row) for row in data.flatten(0, -2).tolist()))

    return run


def make_pieces(counts: list[int], rows: int, seed: int) -> Pieces:
    """Some rows of some pieces saw no token, and whatever their result is must not count; some of all pieces."""
    source = torch.Generator().manual_seed(seed)
    shape = (sum(counts), rows)
    values = (torch.randn(*shape, 512, generator=source) * 2.0**13).half()
    scales = 2.0 ** torch.randint(-16, -10, (*shape, 2), generator=source)
    lse = torch.randn(shape, generator=source) * 3
    blind = torch.rand(shape, generator=source) < 0.2
    blind[:, 0] |= rows > 1
    values[blind], lse[blind] = float("nan"), float("-inf")
    return Pieces(counts, rows, values, lse, scales)


def expected(pieces: Pieces) -> torch.Tensor:
    values = pieces.values.double().unflatten(-1, (2, 256)) * pieces.scales.double()[..., None]
    found = []
    begin = 0
    for request, count in enumerate(pieces.counts):
        rows = pieces.rows_of(request)
        if count == 0:
            found.append(torch.full((rows, 513), float("nan"), dtype=torch.float64))
            continue
        lse, own = pieces.lse[begin : begin + count, :rows].double(), values[begin : begin + count, :rows]
        total = torch.logsumexp(lse, 0)
        weight = torch.where(lse.isinf(), 0.0, torch.exp(lse - total))
        out = (weight[..., None, None] * own.nan_to_num()).sum(0)
        found.append(torch.cat([total[:, None], in_column_order(out, pieces.rows <= 16).flatten(1)], dim=1))
        begin += count
    return torch.cat(found)


def check(combine: Combine, pieces: Pieces, grid: Grid, dtype: torch.dtype) -> None:
    ours, theirs = combine(pieces, grid, dtype), expected(pieces)
    assert torch.allclose(ours[:, 0], theirs[:, 0], rtol=1e-5, atol=1e-5, equal_nan=True)
    bound = 2.0 ** (-8 if dtype == torch.bfloat16 else -10)
    assert torch.allclose(ours[:, 1:], theirs[:, 1:], rtol=bound, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", [2, 3, 7, 8, 9, 16, 31, 33, 66, 132])
@pytest.mark.parametrize(
    "grid", [Grid(1), Grid(2, descending=True), Grid(3, 8), Grid(1, 1), Grid(2, 2), Grid(5, 1, descending=True)]
)
def test_one_row(combine: Combine, count: int, grid: Grid, dtype: torch.dtype) -> None:
    """The more pieces, the more warps share them."""
    check(combine, make_pieces([count], rows=1, seed=count), grid, dtype)


@pytest.mark.parametrize("counts", [[2], [9], [40], [2, 0, 33, 4], [17, 17, 17]])
@pytest.mark.parametrize("rows", [3, 16, 33])
@pytest.mark.parametrize("grid", [Grid(1), Grid(4, descending=True), Grid(9, 8), Grid(7, 1), Grid(9, 2)])
def test_many_rows(combine: Combine, counts: list[int], rows: int, grid: Grid) -> None:
    """With few thread blocks each warp has several, one after the other."""
    check(combine, make_pieces(counts, rows, seed=rows), grid, DTYPES[rows % 2])


@pytest.mark.parametrize("kernel", [1, 2, 4, 8])
@pytest.mark.parametrize("counts, blocks", [([128, 2], 5), ([2, 128], 9), ([128, 0, 3], 7), ([8, 100, 2], 20)])
def test_fewer_pieces_than_warps_share_them(combine: Combine, counts: list[int], blocks: int, kernel: int) -> None:
    """Of one request; of the other each warp has some."""
    check(combine, make_pieces(counts, rows=1, seed=blocks), Grid(blocks, kernel), DTYPES[blocks % 2])


def test_batches_of_requests_cut_and_whole(combine: Combine) -> None:
    numbers = random.Random(2)
    for seed in range(6):
        counts = [numbers.choice([0, 0, 2, 3, 5, 8]) for _ in range(numbers.choice([3, 70]))]
        grid = Grid(numbers.choice([1, 5]), numbers.choice([1, 2, 4, 8]))
        check(combine, make_pieces(counts, numbers.choice([1, 5]), seed), grid, DTYPES[seed % 2])


@pytest.mark.parametrize("kernel", [1, 2, 4, 8])
@pytest.mark.parametrize("heads, queries", [(1, (4, 1, 2, 3)), (3, (1, 3, 1, 2)), (16, (2, 1, 1, 2))])
def test_requests_of_different_query_tokens(
    combine: Combine, heads: int, queries: tuple[int, ...], kernel: int
) -> None:
    """Rows that a request has not are nobody's results; in the output the next request's are in their place."""
    counts = [3, 40, 2, 0]
    pieces = make_pieces(counts, heads * max(queries), seed=heads)
    pieces.heads, pieces.queries = heads, queries
    owner = [request for request, count in enumerate(counts) for _ in range(count)]
    for piece, request in enumerate(owner):
        absent = slice(pieces.rows_of(request), None)
        pieces.values[piece, absent], pieces.lse[piece, absent] = 1.0, 0.0  # seen if written: the last one was not cut
    for grid in (Grid(1, kernel), Grid(5, kernel, descending=True)):
        check(combine, pieces, grid, DTYPES[heads % 2])
