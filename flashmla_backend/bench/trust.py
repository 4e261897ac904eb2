"""Who keeps requests apart: the same cases for each contender, its answers compared with its own, bit for bit.

Isolation: what a request does not own is filled with NaN, infinity, the largest number or other data, place by place.
Invariance: a request ("needle") is answered alone, then at a random position of larger batches, in other pages.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from flashmla_backend.bench.contenders import Prepare
from flashmla_backend.bench.problems import Problem, make_problem
from flashmla_backend.paging import D_QK
from flashmla_backend.schedule import TILE_TOKENS, pages_of

AGAIN = "the same call again"
ROWS, SPARE, TABLE = "rows past the length", "pages of no request", "table entries past the pages"
PAGES, QUERIES = "pages of other requests", "queries of other requests"
PLACES = (AGAIN, ROWS, SPARE, TABLE, PAGES, QUERIES)
OUT_OF_RANGE = "table entries past the pages, out of range"

HEADS, QUERY_TOKENS = (16, 128), (1, 2)
LENGTHS = [3000, 2, 63, 64, 65, 700, 128, 129, 2000, 90, 255, 1000, 500, 31, 4000, 200]
NEEDLES = (2, 40, 64, 65, 500, 1000, 2047, 4096, 8000, 20_000)
BATCHES = (8, 64, 128)
ARRANGEMENTS = 5  # of each needle in each batch
LONGEST_NEIGHBOUR = 3000
SPARE_PAGES = 40
BAD_ENTRIES = (-1, 2**31 - 1)

FILLS: dict[str, Callable[[torch.Tensor], object]] = {
    "NaN": lambda x: x.fill_(float("nan")),
    "infinity": lambda x: x.fill_(float("inf")),
    "the largest number": lambda x: x.fill_(torch.finfo(x.dtype).max),
    "other data": lambda x: x.normal_(),
}


class Tally:
    """Cases of one contender in one kind of case. Counting waits for no GPU before `row`."""

    def __init__(self) -> None:
        self.changed: list[torch.Tensor] = []  # bool vectors, an element a case
        self.error: str | None = None

    def row(self, case: str, contender: str) -> dict[str, Any]:
        changed = torch.cat([vector.cpu() for vector in self.changed]) if self.changed else torch.zeros(0)
        row = {"case": case, "contender": contender, "cases": changed.numel(), "changed": int(changed.sum())}
        return row | ({"error": self.error} if self.error else {})


@dataclass(frozen=True)
class Scene:
    """A problem of one rotation, and whose every row of its cache is."""

    problem: Problem
    owner: torch.Tensor  # [P, 64]: the request whose token lies there; -1 past its length, -2 in pages of nobody


def make_scene(lengths: Sequence[int], heads: int, s_q: int, device: torch.device) -> Scene:
    pages = sum(map(pages_of, lengths)) + SPARE_PAGES
    pool = torch.randn(pages, TILE_TOKENS, 1, D_QK, device=device).bfloat16()
    problem = make_problem(pool, list(lengths), heads, s_q)
    owner = torch.full((pages, TILE_TOKENS), -2, device=device)
    owner[problem.page_ids[0]] = -1
    token = torch.arange(max(lengths), device=device)
    request, token = (token < problem.seq_lens[:, None]).nonzero(as_tuple=True)
    owner[problem.block_tables[0][request, token // TILE_TOKENS], token % TILE_TOKENS] = request
    pool[owner < 0] = 0
    return Scene(problem, owner)


def with_table_entries(scene: Scene, entries: torch.Tensor) -> Problem:
    """Unused entries of the block table replaced by some of `entries`."""
    problem = scene.problem
    table = problem.block_tables[0]
    column = torch.arange(table.shape[1], device=table.device)
    unused = column >= ((problem.seq_lens + TILE_TOKENS - 1) // TILE_TOKENS)[:, None]
    drawn = entries[torch.randint(len(entries), table.shape, device=table.device)].to(table.dtype)
    return replace(problem, block_tables=[torch.where(unused, drawn, table)])


def filled(scene: Scene, place: str, fill: Callable[[torch.Tensor], object], watched: torch.Tensor) -> Problem:
    """The scene's problem with one place filled. watched: [B] bool, requests whose data stay as they are."""
    if place == AGAIN:
        return scene.problem
    owner = scene.owner
    cache, q = scene.problem.cache.clone(), scene.problem.queries[0].clone()
    theirs = (owner >= 0) & ~watched[owner.clamp(min=0)]
    rows = {ROWS: owner == -1, SPARE: owner == -2, TABLE: owner == -2, PAGES: theirs}.get(place)
    if rows is None:
        other = torch.empty_like(q)
        fill(other)
        q = torch.where(watched[:, None, None, None], q, other)
    else:
        other = torch.empty_like(cache)
        fill(other)
        cache = torch.where(rows[..., None, None], other, cache)
    problem = scene.problem
    if place == TABLE:
        problem = with_table_entries(scene, (owner[:, 0] == -2).nonzero()[:, 0])
    return replace(problem, cache=cache, queries=[q])


def answer(prepare: Prepare, problem: Problem) -> torch.Tensor | str:
    """The contender's answer, or what it raised: that is part of the report."""
    try:
        return prepare(problem)[0]().clone()  # a rival may return its workspace
    except Exception as error:
        return f"{type(error).__name__}: {error}".partition("\n")[0][:200]


def compare(tally: Tally, out: torch.Tensor | str, expected: torch.Tensor | str, chosen: torch.Tensor | slice) -> None:
    """Count which of the chosen requests' answers differ in any bit."""
    if isinstance(expected, str) or isinstance(out, str):
        tally.error = expected if isinstance(expected, str) else str(out)
        return
    x, y = (t[chosen].contiguous().view(torch.int16) for t in (out, expected))
    tally.changed.append((x != y).flatten(1).any(1))


def isolation(contenders: Mapping[str, Prepare], device: torch.device, lengths: Sequence[int] = LENGTHS) -> list[dict]:
    """A row for each place and contender; a case is a request, a fill and a shape."""
    tallies = {(place, name): Tally() for place in PLACES for name in contenders}
    for heads, s_q in ((heads, s_q) for heads in HEADS for s_q in QUERY_TOKENS):
        scene = make_scene(lengths, heads, s_q, device)
        calm = {name: answer(prepare, scene.problem) for name, prepare in contenders.items()}
        for place, fill, half in ((p, f, half) for p in PLACES for f in FILLS.values() for half in range(2)):
            watched = torch.arange(len(lengths), device=device) % 2 == half
            problem = filled(scene, place, fill, watched)
            for name, prepare in contenders.items():
                compare(tallies[place, name], answer(prepare, problem), calm[name], watched)
    return [tally.row(place, name) for (place, name), tally in tallies.items()]


def out_of_range(prepare: Prepare, device: torch.device, lengths: Sequence[int] = LENGTHS) -> Tally:
    """Unused table entries that name no page. May end the process, or CUDA in it."""
    tally = Tally()
    for heads, s_q in ((heads, s_q) for heads in HEADS for s_q in QUERY_TOKENS):
        scene = make_scene(lengths, heads, s_q, device)
        calm = answer(prepare, scene.problem)
        for entry in BAD_ENTRIES:
            problem = with_table_entries(scene, torch.tensor([entry], device=device))
            compare(tally, answer(prepare, problem), calm, slice(None))
            if device.type == "cuda":
                torch.cuda.synchronize()  # an illegal access belongs to this case
    return tally


@dataclass(frozen=True)
class Needle:
    """A request that is to be found again: q [S_q, H_q, 576] and its tokens [length, 1, 576]."""

    q: torch.Tensor
    tokens: torch.Tensor

    def place(self, pool: torch.Tensor, lengths: list[int], position: int, seed: int) -> Problem:
        """A problem over the pool with the needle as one of its requests, its tokens written into its pages."""
        problem = make_problem(pool, lengths, self.q.shape[1], self.q.shape[0], seed=seed)
        problem.queries[0][position] = self.q
        token = torch.arange(len(self.tokens), device=pool.device)
        pool[problem.block_tables[0][position, token // TILE_TOKENS], token % TILE_TOKENS] = self.tokens
        return problem


def arrangements(needle: int, batch: int, source: random.Random) -> Iterator[tuple[list[int], int]]:
    """Lengths of a batch with the needle among them, and where."""
    for _ in range(ARRANGEMENTS):
        longest = LONGEST_NEIGHBOUR // source.choice([1, 3, 30])
        lengths = [source.randint(2, longest) for _ in range(batch)]
        position = source.randrange(batch)
        lengths[position] = needle
        yield lengths, position


def invariance(
    contenders: Mapping[str, Prepare],
    device: torch.device,
    needles: Sequence[int] = NEEDLES,
    batches: Sequence[int] = BATCHES,
) -> list[dict]:
    """A row for each batch size and contender; a case is a needle in a batch."""
    source = random.Random(0)
    tallies = {(batch, name): Tally() for batch in batches for name in contenders}
    pages = max(batches) * pages_of(LONGEST_NEIGHBOUR) + pages_of(max(needles))
    pool = torch.randn(pages, TILE_TOKENS, 1, D_QK, device=device, dtype=torch.bfloat16)
    for heads, s_q, length in ((h, s, n) for h in HEADS for s in QUERY_TOKENS for n in needles):
        needle = Needle(
            torch.randn(s_q, heads, D_QK, device=device).bfloat16(),
            torch.randn(length, 1, D_QK, device=device).bfloat16(),
        )
        problem = needle.place(pool, [length], 0, seed=0)
        alone = {name: answer(prepare, problem) for name, prepare in contenders.items()}
        for batch in batches:
            for lengths, position in arrangements(length, batch, source):
                problem = needle.place(pool, lengths, position, seed=source.randrange(1 << 30))
                for name, prepare in contenders.items():
                    out = answer(prepare, problem)
                    if not isinstance(out, str):
                        out = out[position, None]
                    compare(tallies[batch, name], out, alone[name], slice(None))
    return [tally.row(f"alone and in a batch of {batch}", name) for (batch, name), tally in tallies.items()]


def markdown(report: Mapping[str, Any]) -> str:
    """The report as a table: a line for each kind of case, a column for each contender."""
    names = list(dict.fromkeys(row["contender"] for row in report["rows"]))
    cells: dict[str, dict[str, str]] = {}
    for row in report["rows"]:
        if row.get("error"):
            text = "fails"
        elif row["changed"]:
            text = f"**{row['changed']} of {row['cases']} differ**"
        else:
            text = f"holds ({row['cases']})"
        cells.setdefault(row["case"], {})[row["contender"]] = text
    lines = [f"| | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    lines += [f"| {case} | {' | '.join(line.get(name, '-') for name in names)} |" for case, line in cells.items()]
    return "\n".join(lines) + "\n"
