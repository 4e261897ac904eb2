// Batch-invariant mode: how a request's pages are cut into leaves, by its length alone.
//
// A leaf is computed from fresh accumulators. The leaves of each half of a request are added up
// from left to right, then the halves. flashmla_backend/leaves.py specifies it all. Nothing here
// but integer arithmetic: tests/emulation compiles it for the host.
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

// The leaf that holds `page`, of 2^`log_count` leaves.
__device__ __forceinline__ int leaf_number(int pages, int page, int log_count) {
  return ((static_cast<uint32_t>(page + 1) << log_count) - 1) / pages;
}

__device__ __forceinline__ int leaf_begin(int pages, int number, int log_count) {
  return static_cast<int>(static_cast<uint64_t>(pages) * number >> log_count);
}

// Where the leaf that holds `page` ends, of a request of `pages` pages.
__device__ __forceinline__ int leaf_end(int pages, int page, int max_leaves) {
  const int log_count = 31 - __clz(leaf_count(pages, max_leaves));
  return leaf_begin(pages, leaf_number(pages, page, log_count) + 1, log_count);
}

// Where the leaf that holds `page` belongs. A thread block has a room for what it has of each half
// of a request; the last leaf of an item is not added to it but takes up what waits.
struct LeafPlace {
  int half;
  int first_half;  // of the item, which begins with `item_begin`
  bool opens;      // its half: the room is empty

  __device__ __forceinline__ LeafPlace(int page, int item_begin, int pages, int max_leaves) {
    const int leaves = leaf_count(pages, max_leaves), log_count = 31 - __clz(leaves);
    const int number = leaf_number(pages, page, log_count);
    half = 2 * number >= leaves;
    first_half = item_begin == 0 ? 0 : half;
    opens = leaf_begin(pages, number, log_count) <= item_begin || 2 * number == leaves;
  }
};

}  // namespace flashmla
