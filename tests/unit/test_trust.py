"""The isolation and invariance cases: ours hold where they must, and contenders that do not are found."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from flashmla_backend.bench import contenders, trust
from flashmla_backend.bench.contenders import Call
from flashmla_backend.bench.problems import Problem

CPU = torch.device("cpu")
LENGTHS = [70, 2, 300, 64]

ours = contenders.LOADERS["ours"](CPU)


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(trust, "HEADS", (4,))
    monkeypatch.setattr(trust, "QUERY_TOKENS", (1,))
    monkeypatch.setattr(trust, "SPARE_PAGES", 3)
    monkeypatch.setattr(trust, "FILLS", {name: trust.FILLS[name] for name in ("NaN", "other data")})
    monkeypatch.setattr(trust, "LONGEST_NEIGHBOUR", 200)
    yield


def reads_whole_pages(problem: Problem) -> list[Call]:
    """Rows past a length get a weight of 0, which NaN and infinity survive."""

    def call() -> torch.Tensor:
        out = ours(problem)[0]()
        for request, length in enumerate(problem.lengths):
            page = problem.block_tables[0][request, (length - 1) // 64]
            out[request] += 0 * problem.cache[page, :, 0, :512].sum(0)
        return out

    return [call]


def splits_by_batch(problem: Problem) -> list[Call]:
    """Rounds otherwise in a larger batch."""
    return [lambda: ours(problem)[0]() * (1 + problem.batch / 16)]


def refuses(problem: Problem) -> list[Call]:
    raise RuntimeError("not for this shape\nand more")


def changed(rows: list[dict]) -> dict[tuple[str, str], tuple[int, int]]:
    return {(row["case"], row["contender"]): (row["changed"], row["cases"]) for row in rows}


def test_isolation() -> None:
    rows = trust.isolation({"ours": ours, "whole pages": reads_whole_pages, "none": refuses}, CPU, LENGTHS)
    result = changed(rows)
    for place in trust.PLACES:
        assert result[place, "ours"] == (0, 8)  # 4 requests, 2 fills
        leaks = 3 if place == trust.ROWS else 0  # of the requests with unused rows, by NaN
        assert result[place, "whole pages"] == (leaks, 8)
        assert result[place, "none"] == (0, 0)
    assert {row["error"] for row in rows if row["contender"] == "none"} == {"RuntimeError: not for this shape"}


def test_entries_out_of_range() -> None:
    tally = trust.out_of_range(ours, CPU, LENGTHS)
    assert tally.row("entries", "ours") == {"case": "entries", "contender": "ours", "cases": 8, "changed": 0}


def test_invariance() -> None:
    rows = trust.invariance({"splits": splits_by_batch, "none": refuses}, CPU, needles=(3, 130), batches=(2, 5))
    result = changed(rows)
    for batch in (2, 5):
        assert result[f"alone and in a batch of {batch}", "splits"] == (10, 10)
    assert [row["error"] for row in rows if row["contender"] == "none"] == ["RuntimeError: not for this shape"] * 2


def test_a_contender_without_splits_is_invariant() -> None:
    alone = contenders.LOADERS["torch_absorbed"](CPU)
    (row,) = trust.invariance({"absorbed": alone}, CPU, needles=(3, 130), batches=(4,))
    assert (row["changed"], row["cases"]) == (0, 10)


def test_the_table_says_who_holds() -> None:
    rows = [
        {"case": "a", "contender": "ours", "cases": 7, "changed": 0},
        {"case": "a", "contender": "other", "cases": 7, "changed": 2},
        {"case": "b", "contender": "other", "cases": 0, "changed": 0, "error": "exit code -6"},
    ]
    expected = "| | ours | other |\n|---|---|---|\n| a | holds (7) | **2 of 7 differ** |\n| b | - | fails |\n"
    assert trust.markdown({"rows": rows}) == expected
