// Batch-invariant mode: how a request's pages are cut into leaves, by its length alone.
//
// A leaf is computed from fresh accumulators; leaves are merged pairwise, as a binary tree.
// flashmla_backend/leaves.py specifies it all. Nothing here but integer arithmetic:
// tests/emulation compiles it for the host.
#pragma once

#include <cstdint>

#include "flashmla/schedule.h"

namespace flashmla {

constexpr int kMinLeafPages = 4;
constexpr int kMinSharedLeafPages = 6;  // where several row tiles share pages

// Log2 of the leaves of a request, of at most `max_leaves`.
__device__ __forceinline__ int log_leaf_count(int pages, int max_leaves) {
  const bool one_tile = max_leaves == FLASHMLA_MAX_LEAVES;
  const int wholes = one_tile ? pages / kMinLeafPages : pages / kMinSharedLeafPages;
  if (wholes < 2) return 0;
  const int log_most = 31 - __clz(wholes);
  const int log_root = (33 - __clz(pages - 1)) / 2 + one_tile;  // at least the root of the pages
  const int log_count = log_most < log_root ? log_most : log_root,
            log_limit = 31 - __clz(max_leaves);
  return log_count < log_limit ? log_count : log_limit;
}

__device__ __forceinline__ int leaf_count(int pages, int max_leaves) {
  return 1 << log_leaf_count(pages, max_leaves);
}

// Goes through the leaves of an item of a request of `pages` pages, one after the other: only where
// it starts does it divide.
struct LeafCursor {
  int log_count;      // of the request's leaves
  int first, number;  // among them: the item's first, and where the cursor is

  __device__ __forceinline__ LeafCursor(int pages, int page_begin, int max_leaves)
      : log_count(log_leaf_count(pages, max_leaves)) {
    first = number = ((static_cast<uint32_t>(page_begin + 1) << log_count) - 1) / pages;
  }
  // Among the item's leaves, from 0.
  __device__ __forceinline__ int leaf() const { return number - first; }
  // Page where the leaf ends, and the next one begins.
  __device__ __forceinline__ int end(int pages) const {
    return static_cast<int>(pages * (int64_t{number} + 1) >> log_count);
  }
  __device__ __forceinline__ void advance() { ++number; }
};

// The leaves of an item, counted from 0, are merged as a binary counter carries: bit n of what
// this returns says that a subtree of 2^n leaves waits for the one that ends with `leaf`. The
// lowest is merged first. The last leaf takes up all that wait.
__device__ __forceinline__ uint32_t merged_subtrees(int leaf, bool last) {
  return last ? leaf : leaf & ~(leaf + 1);
}

// Log2 of the leaves of the subtree that ends with `leaf`, which then waits.
__device__ __forceinline__ int waiting_subtree(int leaf) { return __ffs(~leaf) - 1; }

}  // namespace flashmla
