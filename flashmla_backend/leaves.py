"""Batch-invariant mode: arithmetic that knows a request's length and the shapes of the call, and nothing else.

A request's pages are cut into *leaves*, each attended to on its own, and the results are merged pairwise, as a binary
tree. Work items are whole requests or subtrees of a power of two of leaves, so that wherever a schedule cuts, every
result is made of the same parts in the same order.

The Hopper kernels keep every node, but for the root of an fp16 output, as fp16 values in units of a power of two, be it
in memory or in registers: where it lies depends on the cut, and its bits must not. The CPU keeps all of them fp32.

More leaves let more thread blocks share a request; every one costs a store and a load of its rows.
"""

from __future__ import annotations

from itertools import pairwise

import torch

MIN_LEAF_PAGES = 4  # the smallest leaf, as long as there are several
MIN_SHARED_LEAF_PAGES = 6  # the same where row tiles share pages: they wait for merging, not for memory
MAX_LEAVES = 128  # of all row tiles together: about one for each SM
ROOM_FLOATS = 16 * 512 // 2 + 2 * 32 * 4  # that 16 rows of a result take: fp16 values, and states of both halves


def max_leaves(row_tiles: int) -> int:
    """The most leaves that a request is cut into, a power of two."""
    return 1 << (max(1, MAX_LEAVES // row_tiles).bit_length() - 1)


def leaf_count(pages: int, most: int) -> int:
    """Leaves of a request: a power of two, about the root of its pages, twice that for a single row tile.

    None is smaller than MIN_LEAF_PAGES or MIN_SHARED_LEAF_PAGES unless it is alone.
    """
    one_tile = most == MAX_LEAVES
    smallest = MIN_LEAF_PAGES if one_tile else MIN_SHARED_LEAF_PAGES
    log_most = max(1, pages // smallest).bit_length() - 1
    log_root = (max(0, pages - 1).bit_length() + 1) // 2 + one_tile
    return min(most, 1 << min(log_most, log_root))


def leaves_of(pages: int, begin: int, end: int, most: int) -> list[tuple[int, int]]:
    """First page and end of the leaves in pages [begin, end) of a request of `pages`; all are near-equal."""
    count = leaf_count(pages, most)
    bounds = [pages * j // count for j in range(count + 1)]
    return [leaf for leaf in pairwise(bounds) if begin <= leaf[0] < end] or [(begin, end)]


def room_floats(rows: int, blocks: int, most: int) -> int:
    """fp32 elements that the thread blocks of the decode kernel need for what waits to be merged.

    A thread block has a room for each level of the tree below the root.

    Args:
        rows: query rows of a request and KV head.
        blocks: thread blocks, `row_tiles` times parts.
        most: `max_leaves(row_tiles)`.
    """
    levels = most.bit_length() - 1
    sixteens = min(max(2, -(-rows // 16)), 4)  # few rows are dealt to all warps, as if they were 32
    return blocks * levels * sixteens * ROOM_FLOATS


def merge(
    first: tuple[torch.Tensor, torch.Tensor], second: tuple[torch.Tensor, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Merge the results of two siblings, each o [.., 512] and its log-sum-exp [..], fp32."""
    (o, lse), (other, other_lse) = first, second
    most = torch.maximum(lse, other_lse)
    finite = most.masked_fill(most == float("-inf"), 0.0)  # rows that see no token weigh 0, not NaN
    weight, other_weight = torch.exp(lse - finite), torch.exp(other_lse - finite)
    total = weight + other_weight
    scale = torch.where(total > 0, 1 / total, 0.0)
    merged = (weight * scale)[..., None] * o + (other_weight * scale)[..., None] * other
    return merged, most + torch.log(total)


def merge_tree(results: list[tuple[torch.Tensor, torch.Tensor]]) -> tuple[torch.Tensor, torch.Tensor]:
    """The root of the tree over a power of two of results."""
    while len(results) > 1:
        results = [merge(*siblings) for siblings in zip(results[::2], results[1::2], strict=True)]
    return results[0]
