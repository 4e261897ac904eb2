"""One captured graph, replayed over thousands of random steps, does bit for bit what eager does.

The plan is made inside the graph, as the engines do, and two layers follow it. Each replay finds new lengths (zeros and
padding among them), a new page map and new queries where they lay at capture; eager gets its own copies of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch

from flashmla_backend import DecodePlan, mla_decode
from tests.isolation import MODES, same_bits
from tests.kernels.problems import POISON_PAGE, SCALE, Problem, capture, plan_of

BATCH, PAGES, LONGEST = 32, 400, 1500
REPLAYS = 1500

Results = list[torch.Tensor]


def random_lengths(replays: int, edge: int, generator: torch.Generator) -> torch.Tensor:
    """[replays, BATCH] int32 on the CPU: long and short steps, lengths at multiples of `edge`, zeros, and padding at
    the end.
    """

    def some(share: float, *shape: int) -> torch.Tensor:
        return torch.rand(shape, generator=generator) < share

    lengths = torch.randint(1, LONGEST + 1, (replays, BATCH), generator=generator)
    lengths = torch.where(some(0.3, replays, 1), lengths % 130, lengths)
    at_edge = (lengths // edge * edge + torch.randint(-1, 2, lengths.shape, generator=generator)).clamp_(min=0)
    lengths = torch.where(some(0.2, *lengths.shape), at_edge, lengths)
    lengths[some(0.1, *lengths.shape)] = 0
    real = torch.randint(0, BATCH + 1, (replays, 1), generator=generator)
    return lengths.where(torch.arange(BATCH) < real, 0).int()


def random_steps(caches: Results, h_q: int, s_q: int, width: int, replays: int) -> Iterator[Problem]:
    """Problems over the first cache; any page may be in several tables, poison is past the lengths."""
    page_size = caches[0].shape[1]
    device = caches[0].device
    generator = torch.Generator().manual_seed(100 * h_q + s_q)
    lengths = random_lengths(replays, min(page_size, 64), generator).to(device)
    queries = torch.randn(8, BATCH, s_q, h_q, 576, device=device).to(caches[0].dtype)
    first_token = torch.arange(width, device=device) * page_size
    for index, seq_lens in enumerate(lengths):
        pages = torch.randint(PAGES, (BATCH, width), dtype=torch.int32, device=device)
        table = pages.masked_fill_(first_token >= seq_lens[:, None], POISON_PAGE)
        q = queries[index % 8].masked_fill((seq_lens == 0)[:, None, None, None], float("nan"))
        yield Problem(q, caches[0], table, seq_lens, caches[0])


def differing_replays(
    h_q: int, h_kv: int, s_q: int, page_size: int, mode: dict[str, object], replays: int
) -> list[int]:
    torch.manual_seed(h_q + s_q)
    device = torch.device("cuda")
    caches = [torch.randn(PAGES, page_size, h_kv, 576, device=device).div_(10).bfloat16() for _ in range(2)]

    def layers(problem: Problem, plan: DecodePlan) -> Results:
        results = [plan.items, plan.part_offsets, plan.split_offsets]
        for cache in caches:  # two layers share the plan and its workspaces
            results += mla_decode(problem.q, cache, plan, softmax_scale=SCALE)
        return results

    width = -(-LONGEST // page_size) + 1
    persistent = Problem(
        torch.zeros(BATCH, s_q, h_q, 576, dtype=caches[0].dtype, device=device),
        caches[0],
        torch.zeros(BATCH, width, dtype=torch.int32, device=device),
        torch.full((BATCH,), LONGEST, dtype=torch.int32, device=device),
        caches[0],
    )
    largest = plan_of(persistent, causal=True, **mode)
    graph, captured = capture(lambda: layers(persistent, plan_of(persistent, causal=True, reuse=largest, **mode)))
    differs = torch.zeros(replays, dtype=torch.bool, device=device)
    for index, problem in enumerate(random_steps(caches, h_q, s_q, width, replays)):
        persistent.q.copy_(problem.q)
        persistent.block_table.copy_(problem.block_table)
        persistent.seq_lens.copy_(problem.seq_lens)
        graph.replay()
        eager = layers(problem, plan_of(problem, causal=True, **mode))
        same = [same_bits(ours[None], theirs[None]) for ours, theirs in zip(captured, eager, strict=True)]
        silent = (captured[3] == 0).flatten(1).all(1) | (problem.seq_lens > 0)  # padding has an answer of 0
        differs[index] = ~(torch.stack(same).all() & silent.all())
    return differs.nonzero().flatten().tolist()


@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize("s_q", [1, 2, 3, 4])
@pytest.mark.parametrize("h_q, h_kv, page_size", [(16, 1, 64), (20, 2, 128), (128, 1, 256), (63, 3, 16)])
def test_replays_equal_eager(
    h_q: int,
    h_kv: int,
    page_size: int,
    s_q: int,
    mode: dict[str, object],
    record_property: Callable[[str, object], None],
) -> None:
    record_property("cases", REPLAYS)
    assert not differing_replays(h_q, h_kv, s_q, page_size, mode, REPLAYS)
