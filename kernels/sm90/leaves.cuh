// Batch-invariant mode: how a request's pages are cut into leaves, by its length alone.
//
// A leaf is computed from fresh accumulators, and leaves are merged pairwise, as a binary tree.
// flashmla_backend/leaves.py specifies both. Nothing here but integer arithmetic: tests/emulation
// compiles it for the host.
#pragma once

#include <cstdint>

namespace flashmla {

constexpr int kMinLeafPages = 4;

// Leaves of a request, a power of two of at most `max_leaves`.
__device__ __forceinline__ int leaf_count(int pages, int max_leaves) {
  if (pages < 2 * kMinLeafPages) return 1;
  const int count = 1 << (31 - __clz(pages / kMinLeafPages));
  return count < max_leaves ? count : max_leaves;
}

// Where the leaf that holds `page` ends, of a request of `pages` pages.
__device__ __forceinline__ int leaf_end(int pages, int page, int max_leaves) {
  const int log_count = 31 - __clz(leaf_count(pages, max_leaves));
  const uint32_t number = ((static_cast<uint32_t>(page + 1) << log_count) - 1) / pages;
  return static_cast<int>((static_cast<uint64_t>(pages) * (number + 1)) >> log_count);
}

}  // namespace flashmla
