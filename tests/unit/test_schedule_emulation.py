"""The device scheduler's own code, its threads emulated on the CPU, against the specification."""

from __future__ import annotations

import random
import subprocess
from collections.abc import Callable, Iterator

import pytest

from flashmla_backend import sm90
from flashmla_backend.leaves import max_leaves
from flashmla_backend.schedule import make_schedule, max_items, num_parts
from tests.emulators import build, needs_compiler

pytestmark = needs_compiler

Device = Callable[[list[int], int, int, bool], list[int]]


@pytest.fixture(scope="module", params=["ascending", "descending"])
def device(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Device]:
    """The device's answer as numbers: items, part offsets, split offsets. Threads run in the order of the parameter,
    so that a missing barrier shows in one of them."""
    program = build("schedule", tmp_path_factory.mktemp("emulation"))
    running = subprocess.Popen([program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert running.stdin is not None and running.stdout is not None

    def run(seq_lens: list[int], row_tiles: int, num_sms: int, batch_invariant: bool) -> list[int]:
        parts, order = num_parts(num_sms, row_tiles), int(request.param == "descending")
        most = max_leaves(row_tiles) if batch_invariant else 0
        numbers = [len(seq_lens), parts, most, *sm90.cost_of(64 * row_tiles), order, *seq_lens]
        print(*numbers, file=running.stdin, flush=True)
        return [int(number) for number in running.stdout.readline().split()]

    yield run
    running.stdin.close()
    assert running.wait(timeout=60) == 0


def specified(seq_lens: list[int], row_tiles: int, num_sms: int, batch_invariant: bool) -> list[int]:
    made = make_schedule(seq_lens, row_tiles, num_sms, batch_invariant=batch_invariant)
    items = [number for part in made.parts for item in part for number in item]
    items += [-1] * (4 * max_items(len(seq_lens), len(made.parts)) - len(items))
    offsets = [0]
    for part in made.parts:
        offsets.append(offsets[-1] + len(part))
    return [*items, *offsets, *made.split_offsets]


def random_lengths(source: random.Random) -> list[int]:
    kinds: list[Callable[[], list[int]]] = [
        lambda: [source.randint(0, 5000) for _ in range(source.randint(0, 150))],
        lambda: [source.randint(0, 300) for _ in range(source.randint(0, 400))],
        lambda: [source.randint(0, 1 << 20) for _ in range(source.randint(1, 12))],
        lambda: [source.randint(0, 2**31 - 1) for _ in range(source.randint(1, 12))],
        lambda: [
            source.choice([-(2**31), -100, -1, 0, 1, 63, 64, 65, 192, 255, 256, 257])
            for _ in range(source.randint(0, 200))
        ],
        lambda: [source.randint(0, 20000) for _ in range(1500)],
        lambda: [source.randint(1, 9000)] * source.randint(1, 300),
    ]
    return source.choice(kinds)()


def test_random_lengths(device: Device) -> None:
    source = random.Random(0)
    for batch_invariant in (False, True) * 90:
        seq_lens = random_lengths(source)
        row_tiles, num_sms = source.choice([1, 1, 2, 3, 4, 8, 200]), source.choice([1, 2, 7, 78, 132, 132, 512])
        case = seq_lens, row_tiles, num_sms, batch_invariant
        assert device(*case) == specified(*case), case[1:]


@pytest.mark.parametrize(
    "seq_lens",
    [[], [0], [1], [64], [65], [2**31 - 1], [0] * 300, [1] * 8192, [2**31 - 1] * 200, [1_048_576] + [1] * 131],
    ids=lambda lengths: f"{len(lengths)}x{max(lengths, default=0)}",
)
def test_edges(device: Device, seq_lens: list[int]) -> None:
    for row_tiles in (1, 2, 133):
        for batch_invariant in (False, True):
            case = seq_lens, row_tiles, 132, batch_invariant
            assert device(*case) == specified(*case)
