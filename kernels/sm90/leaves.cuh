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

// Leaves of a request, a power of two of at most `max_leaves`.
__device__ __forceinline__ int leaf_count(int pages, int max_leaves) {
  const bool one_tile = max_leaves == FLASHMLA_MAX_LEAVES;
  const int smallest = one_tile ? kMinLeafPages : kMinSharedLeafPages;
  if (pages < 2 * smallest) return 1;
  const int log_most = 31 - __clz(pages / smallest);
  const int log_root = (33 - __clz(pages - 1)) / 2 + one_tile;  // at least the root of the pages
  const int count = 1 << (log_most < log_root ? log_most : log_root);
  return count < max_leaves ? count : max_leaves;
}

// The leaf that holds `page`, of a request of `pages` pages.
__device__ __forceinline__ int leaf_number(int pages, int page, int max_leaves) {
  const int log_count = 31 - __clz(leaf_count(pages, max_leaves));
  return ((static_cast<uint32_t>(page + 1) << log_count) - 1) / pages;
}

// Where that leaf ends.
__device__ __forceinline__ int leaf_end(int pages, int page, int max_leaves) {
  const int log_count = 31 - __clz(leaf_count(pages, max_leaves));
  const int64_t next = leaf_number(pages, page, max_leaves) + 1;
  return static_cast<int>(pages * next >> log_count);
}

// The leaves of an item, counted from 0, are merged as a binary counter carries: bit n of what
// this returns says that a subtree of 2^n leaves waits for the one that ends with `leaf`. The
// lowest is merged first. The last leaf takes up all that wait.
__device__ __forceinline__ uint32_t merged_subtrees(int leaf, bool last) {
  return last ? leaf : leaf & ~(leaf + 1);
}

// Log2 of the leaves of the subtree that ends with `leaf`, which then waits.
__device__ __forceinline__ int waiting_subtree(int leaf) { return __ffs(~leaf) - 1; }

}  // namespace flashmla
