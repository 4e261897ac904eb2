// Batch-invariant mode: how a request's pages are cut into leaves, by its length alone.
//
// A leaf is computed from fresh accumulators. Groups of leaves are merged from left to right, and
// groups pairwise, as a binary tree. flashmla_backend/leaves.py specifies it all. Nothing here but
// integer arithmetic: tests/emulation compiles it for the host.
#pragma once

#include <cstdint>

#include "flashmla/schedule.h"

namespace flashmla {

constexpr int kMinLeafPages = 4;
constexpr int kMinSharedLeafPages = 6;  // where several row tiles share pages
constexpr int kLogGroupLeaves = 2;
constexpr int kGroupLeaves = 1 << kLogGroupLeaves;

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

// Subtrees of a request that can wait for their sibling at the same time.
__device__ __forceinline__ int subtree_rooms(int max_leaves) {
  const int heights = 31 - __clz(max_leaves);
  return heights > kLogGroupLeaves ? heights - kLogGroupLeaves + 1 : heights > 0;
}

// Waiting subtrees, those of the first rooms, that leaf `number` of an item is merged with: its
// group so far, and if it is the group's last one, those that this completes.
__device__ __forceinline__ int siblings_of(int number) {
  const int place = number % kGroupLeaves;
  return place + 1 < kGroupLeaves ? place > 0 : __ffs(~(number >> kLogGroupLeaves));
}

// The room in which the subtree that leaf `number` completes waits.
__device__ __forceinline__ int room_of(int number) {
  return number % kGroupLeaves == kGroupLeaves - 1 ? siblings_of(number) : 0;
}

// Where the leaf that holds `page` ends, of a request of `pages` pages.
__device__ __forceinline__ int leaf_end(int pages, int page, int max_leaves) {
  const int log_count = 31 - __clz(leaf_count(pages, max_leaves));
  const uint32_t number = ((static_cast<uint32_t>(page + 1) << log_count) - 1) / pages;
  return static_cast<int>((static_cast<uint64_t>(pages) * (number + 1)) >> log_count);
}

}  // namespace flashmla
