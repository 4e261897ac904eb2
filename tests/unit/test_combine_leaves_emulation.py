"""The combine kernel of batch-invariant mode, on the CPU, against the tree of siblings that it stands for."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch

from tests.combine_rows import combined, in_column_order
from tests.emulators import build, needs_compiler

NO_TOKEN = -(1 << 30)  # exponent of a row that saw none
SIMILAR = 10  # distance of exponents from which on siblings may not add up to twice the larger

pytestmark = needs_compiler


@dataclass
class Pieces:
    """Of a batch: per piece, row and half."""

    counts: list[int]  # of each request, 0: it was not cut
    rows: int
    values: torch.Tensor  # [pieces, rows, 2, 256] fp16
    sums: torch.Tensor  # [pieces, rows, 2] fp32
    exponents: torch.Tensor  # [pieces, rows, 2] int64


Combine = Callable[[Pieces, int, bool, int, torch.dtype], torch.Tensor]
# Words of a lane, or 8: four of them and two thread blocks an SM.
KERNELS = [(words, dtype) for words in (1, 2, 4) for dtype in (torch.float16, torch.bfloat16)] + [(8, torch.bfloat16)]
Kernel = tuple[int, torch.dtype]


@pytest.fixture(scope="module")
def combine(tmp_path_factory: pytest.TempPathFactory) -> Combine:
    program = build("combine_leaves", tmp_path_factory.mktemp("emulation"))

    def run(pieces: Pieces, blocks: int, descending: bool, words: int, dtype: torch.dtype) -> torch.Tensor:
        head = [blocks, pieces.rows, len(pieces.counts), int(descending), words, int(dtype == torch.bfloat16)]
        head += pieces.counts
        states = torch.stack([pieces.sums.double(), pieces.exponents.double()], dim=-1)
        data = torch.cat([states, pieces.values.double()], dim=-1).flatten(0, -2).tolist()
        lines = [
            f"{sum_:.17g} {int(exponent)} " + " ".join(f"{x:.17g}" for x in values) for sum_, exponent, *values in data
        ]
        return combined(program, head, lines)

    return run


def make_pieces(counts: list[int], rows: int, seed: int) -> Pieces:
    """Values as large as fp16 nodes may be, units and sums far apart and alike, rows that saw no token."""
    source = torch.Generator().manual_seed(seed)
    shape = (sum(counts), rows, 2)
    values = (torch.randn(*shape, 256, generator=source) * 2.0**13).clamp(-(2.0**15), 2.0**15).half()
    values[..., :8] = 2.0**15  # siblings of one sign: do they stay within fp16?
    exponents = torch.randint(-12, 13, shape, generator=source) * torch.randint(0, 3, shape, generator=source)
    sums = torch.rand(shape, generator=source) * 2.0**14 + 2.0**10
    blind = torch.rand(shape[:2], generator=source) < 0.2
    values[blind], sums[blind], exponents[blind] = 0, 0, NO_TOKEN
    return Pieces(counts, rows, values, sums.float(), exponents)


def weights(x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of siblings with these exponents, and the exponent of the node above them."""
    above = torch.maximum(x, y) + ((x - y).abs() < SIMILAR)
    first, second = (2.0 ** (own - above).clamp(min=-200).double() for own in (x, y))
    return first, second, above


def expected(pieces: Pieces, dtype: torch.dtype) -> torch.Tensor:
    """Sums of two products with powers of two are exact in fp64, so what rounds is seen here."""
    found = torch.full((len(pieces.counts) * pieces.rows, 513), float("nan"), dtype=torch.float64)
    begin = 0
    for request, count in enumerate(pieces.counts):
        nodes = [(pieces.values[i].double(), pieces.sums[i], pieces.exponents[i]) for i in range(begin, begin + count)]
        begin += count
        while len(nodes) > 1:
            unrounded = len(nodes) == 2 and dtype == torch.float16
            merged = []
            for (x, x_sum, x_exponent), (y, y_sum, y_exponent) in zip(nodes[::2], nodes[1::2], strict=True):
                first, second, above = weights(x_exponent, y_exponent)
                least = 0.0 if unrounded else 2.0**-25  # fp16 knows no smaller power of two
                w, v = (torch.where(weight > least, weight, 0.0)[..., None] for weight in (first, second))
                values = x * w + y * v
                rounded = values.float() if unrounded else values.half()
                sums = (x_sum.double() * first + y_sum.double() * second).float()
                merged.append((rounded.double(), sums, above))
            nodes = merged
        if count == 0:
            continue
        ((values, sums, exponent),) = nodes
        inverse = torch.where(sums > 0, 1 / sums, 0.0)
        out = (values.float() * inverse[..., None]).to(dtype).double()
        lse = sums[:, 0].double().log() + exponent[:, 0] * torch.log(torch.tensor(2.0, dtype=torch.float64))
        own = slice(request * pieces.rows, (request + 1) * pieces.rows)
        found[own, 0] = torch.where(sums[:, 0] > 0, lse, float("-inf"))
        found[own, 1:] = in_column_order(out, few_rows=False).flatten(1)
    return found


def check(combine: Combine, pieces: Pieces, blocks: int, kernel: Kernel, descending: bool = False) -> None:
    ours, theirs = combine(pieces, blocks, descending, *kernel), expected(pieces, kernel[1])
    assert torch.equal(ours[:, 1:].isnan(), theirs[:, 1:].isnan())
    assert torch.equal(ours[:, 1:].nan_to_num(), theirs[:, 1:].nan_to_num())
    assert torch.allclose(ours[:, 0], theirs[:, 0], rtol=1e-6, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("count", [2, 4, 8, 16, 32, 64, 128])
@pytest.mark.parametrize("blocks", [1, 3])
def test_one_request(combine: Combine, count: int, blocks: int, kernel: Kernel) -> None:
    """One row: the more pieces, the more warps share them."""
    check(combine, make_pieces([count], rows=1, seed=count), blocks, kernel, descending=blocks == 3)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("counts, blocks", [([128, 2], 5), ([2, 128], 9), ([128, 0, 4], 7), ([8, 128, 2], 20)])
def test_fewer_pieces_than_warps_share_them(combine: Combine, counts: list[int], blocks: int, kernel: Kernel) -> None:
    """Of one request; of the other each warp has a subtree."""
    check(combine, make_pieces(counts, rows=1, seed=blocks), blocks, kernel)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("counts", [[128], [2, 0, 64, 4], [16, 16]])
def test_more_slices_than_warps(combine: Combine, counts: list[int], kernel: Kernel) -> None:
    check(combine, make_pieces(counts, rows=11, seed=1), 1, kernel)


def test_batches_of_requests_cut_and_whole(combine: Combine) -> None:
    numbers = random.Random(2)
    for seed in range(14):
        counts = [numbers.choice([0, 0, 2, 4, 8]) for _ in range(numbers.choice([3, 40]))]
        check(
            combine,
            make_pieces(counts, rows=numbers.choice([1, 3]), seed=seed),
            numbers.choice([2, 5]),
            kernel=KERNELS[seed % len(KERNELS)],
        )
