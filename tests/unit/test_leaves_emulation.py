"""The decode kernel's own walk over leaves, on the CPU, against the specification."""

from __future__ import annotations

import random
import re
import subprocess
from collections.abc import Callable

import pytest

from flashmla_backend import leaves
from tests.emulators import build, needs_compiler

MOST = (1, 2, 16, 64, 128)

pytestmark = needs_compiler

Case = tuple[int, int, int, int]  # pages of the request, max_leaves, first page and end of the item
Walk = Callable[[list[Case]], list[tuple[list[int], str]]]


@pytest.fixture(scope="module")
def walk(tmp_path_factory: pytest.TempPathFactory) -> Walk:
    """Where each leaf ends, and in which order they are merged, each by its first page: "((0+4)+(8+12))"."""
    program = build("leaves", tmp_path_factory.mktemp("emulation"))

    def run(cases: list[Case]) -> list[tuple[list[int], str]]:
        text = "\n".join(" ".join(map(str, case)) for case in cases)
        output = subprocess.run([program], input=text, capture_output=True, text=True, check=True).stdout
        lines = [line.split() for line in output.splitlines()]
        assert len(lines) == len(cases)
        return [([int(end) for end in ends], tree) for *ends, tree in lines]

    return run


def test_the_kernel_walks_over_the_tree_of_the_specification(walk: Walk, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole requests, and of each power of two of pieces the first, the last and one between."""
    numbers = random.Random(0)
    cases: list[Case] = []
    for pages in [*range(1, 400), 2**25 - 1, 2**25, *(numbers.randint(1, 2**25) for _ in range(300))]:
        for most in MOST:
            for pieces in (1 << i for i in range(leaves.leaf_count(pages, most).bit_length())):
                for piece in {0, numbers.randrange(pieces), pieces - 1}:
                    cases.append((pages, most, pages * piece // pieces, pages * (piece + 1) // pieces))
    monkeypatch.setattr(leaves, "merge", lambda first, second: f"({first}+{second})")
    for case, (ends, tree) in zip(cases, walk(cases), strict=True):
        pages, most, begin, end = case
        held = leaves.leaves_of(pages, begin, end, most)
        assert (held[0][0], held[-1][1]) == (begin, end), case
        assert ends == [end for _, end in held], case
        assert tree == leaves.merge_tree([str(begin) for begin, _ in held]), case


def test_an_item_of_an_older_plan_is_merged_whole(walk: Walk) -> None:
    """It may begin and end anywhere and hold any number of leaves; what it gives is of no use, but no room is missing
    or taken twice."""
    numbers = random.Random(1)
    cases: list[Case] = []
    for _ in range(3000):
        pages = numbers.choice([numbers.randint(2, 100), numbers.randint(2, 2000)])
        begin, end = sorted(numbers.sample(range(pages + 1), 2))
        cases.append((pages, numbers.choice(MOST), begin, end))
    for case, (ends, tree) in zip(cases, walk(cases), strict=True):
        *_, begin, end = case
        assert ends[-1] == end
        assert [int(number) for number in re.findall("[0-9]+", tree)] == [begin, *ends[:-1]], case
        assert "taken" not in tree
