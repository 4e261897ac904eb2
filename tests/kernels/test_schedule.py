"""The device scheduler gives what the specification gives."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch

from flashmla_backend import InvalidArgument, ops
from flashmla_backend.schedule import num_parts


def random_lengths(source: random.Random) -> list[int]:
    kinds = [
        lambda: [source.randint(0, 5000) for _ in range(source.randint(0, 150))],
        lambda: [source.randint(0, 300) for _ in range(source.randint(0, 400))],
        lambda: [source.randint(0, 1 << 20) for _ in range(source.randint(1, 12))],
        lambda: [source.randint(0, 2**31 - 1) for _ in range(source.randint(1, 12))],
        lambda: [source.randint(0, 20000) for _ in range(source.choice([1000, 4096, 8192]))],
        lambda: [source.randint(1, 9000)] * source.randint(1, 300),
    ]
    return source.choice(kinds)()


def check(lengths: list[int], row_tiles: int, num_sms: int) -> None:
    seq_lens = torch.tensor(lengths, dtype=torch.int32)
    for batch_invariant in (False, True):
        shape = row_tiles, num_sms, 64 * row_tiles, batch_invariant
        for ours, theirs in zip(ops.schedule(seq_lens.cuda(), *shape), ops.schedule(seq_lens, *shape), strict=True):
            assert torch.equal(ours.cpu(), theirs), (len(lengths), *shape)


@pytest.mark.parametrize("seed", range(20))
def test_equals_the_specification(seed: int, record_property: Callable[[str, object], None]) -> None:
    source = random.Random(seed)
    record_property("cases", 50)
    for _ in range(25):
        row_tiles, num_sms = source.choice([1, 1, 2, 3, 4, 8, 16, 200]), source.choice([1, 2, 7, 78, 132, 132, 512])
        check(random_lengths(source), row_tiles, num_sms)


@pytest.mark.parametrize("lengths", [[], [0], [1], [2**31 - 1], [0] * 8192, [2**31 - 1] * 8192])
def test_edges(lengths: list[int]) -> None:
    for row_tiles in (1, 2, 132, 133):
        check(lengths, row_tiles, 132)


def test_limits_are_told_by_name() -> None:
    lengths = torch.ones(8193, dtype=torch.int32, device="cuda")
    with pytest.raises(InvalidArgument, match="batch is 8193; accepted: 0 to 8192"):
        ops.schedule(lengths, 1, 132, 64)
    assert num_parts(600, 1) == 600
    with pytest.raises(InvalidArgument, match="num_parts is 600; accepted: 1 to 512"):
        ops.schedule(lengths[:1], 1, 600, 64)
