// Batch-invariant mode: how a request's pages are cut into leaves, by its length alone.
//
// A leaf is computed from fresh accumulators. Groups of leaves are added up from left to right, and
// groups pairwise, as a binary tree. flashmla_backend/leaves.py specifies it all. Nothing here but
// integer arithmetic: tests/emulation compiles it for the host.
#pragma once

#include <cstdint>

#include "flashmla/schedule.h"

namespace flashmla {

constexpr int kMinLeafPages = 4;
constexpr int kMinSharedLeafPages = 6;  // where several row tiles share pages
constexpr int kLogGroups = 2;           // most groups of a request
constexpr int kLogSharedGroups = 1;
constexpr int kMaxGroups = 1 << kLogGroups;

__device__ __forceinline__ bool one_row_tile(int max_leaves) {
  return max_leaves == FLASHMLA_MAX_LEAVES;
}

// Leaves of a request, a power of two of at most `max_leaves`.
__device__ __forceinline__ int leaf_count(int pages, int max_leaves) {
  const bool one_tile = one_row_tile(max_leaves);
  const int smallest = one_tile ? kMinLeafPages : kMinSharedLeafPages;
  if (pages < 2 * smallest) return 1;
  const int log_most = 31 - __clz(pages / smallest);
  const int log_root = (33 - __clz(pages - 1)) / 2 + one_tile;  // at least the root of the pages
  const int count = 1 << (log_most < log_root ? log_most : log_root);
  return count < max_leaves ? count : max_leaves;
}

// The most groups that the leaves of a request are in, a power of two.
__device__ __forceinline__ int max_groups(int max_leaves) {
  const int most = 1 << (one_row_tile(max_leaves) ? kLogGroups : kLogSharedGroups);
  return max_leaves < most ? max_leaves : most;
}

__device__ __forceinline__ int group_count(int pages, int max_leaves) {
  const int leaves = leaf_count(pages, max_leaves), most = max_groups(max_leaves);
  return leaves < most ? leaves : most;
}

// Leaves of each group of a request, as the exponent of 2.
__device__ __forceinline__ int log_group_leaves(int pages, int max_leaves) {
  return __clz(group_count(pages, max_leaves)) - __clz(leaf_count(pages, max_leaves));
}

// Where the leaf that holds `page` ends, of a request of `pages` pages.
__device__ __forceinline__ int leaf_end(int pages, int page, int max_leaves) {
  const int log_count = 31 - __clz(leaf_count(pages, max_leaves));
  const uint32_t number = ((static_cast<uint32_t>(page + 1) << log_count) - 1) / pages;
  return static_cast<int>((static_cast<uint64_t>(pages) * (number + 1)) >> log_count);
}

// Rooms of a thread block for results that wait: one for an odd group as far as it has come, one
// for the even group before it, and for subtrees, one of each height above.
__device__ __forceinline__ int room_count(int max_leaves) {
  return max_leaves < 2 ? 0 : 32 - __clz(max_groups(max_leaves));
}

// What becomes of leaf `number` of an item, whose groups have 2^`log_group` leaves.
struct LeafPlace {
  int room;       // of its group
  bool opens;     // its group: the room is empty
  bool stays;     // it is added to the room, where the group stays
  int subtrees;   // waiting ones, from room 1 on, that it completes otherwise
  int next_room;  // where what it completes waits

  __device__ __forceinline__ LeafPlace(int number, int log_group, bool final) {
    const int last = (1 << log_group) - 1, place = number & last, group = number >> log_group;
    const bool odd = group & 1;
    room = odd ? 0 : 1;
    opens = place == 0;
    stays = !final && (place < last || !odd);
    subtrees = __ffs(~group) - 1;
    next_room = 1 + subtrees;
  }
};

}  // namespace flashmla
