// The producer warpgroup of the decode kernel: pages by TMA, the valid rows of Q by cp.async.
#pragma once

#include "sm90/bounds.cuh"
#include "sm90/decode_shared.cuh"
#include "sm90/ptx/copy.cuh"
#include "sm90/ptx/sync.cuh"

namespace flashmla {

// What a lane loads of every tile of 64 tokens: one box. A page of 64 tokens or more fills a column
// tile with a box; smaller ones, kSmallPages, take two or four, one below the other.
template <bool kSmallPages>
struct Box {
  int count_log2;  // boxes that fill a column tile
  int index;       // which of them
  int tile;        // column tile, 0 .. 31
  int offset;      // in its column tile, in bytes: whole swizzle atoms of 8 rows

  __device__ __forceinline__ explicit Box(const DecodeArguments& a)
      : count_log2(kSmallPages ? kTileLog2 - a.box_log2 : 0),
        index(threadIdx.x & ((1 << count_log2) - 1)),
        tile(threadIdx.x % 32 >> count_log2),
        offset(kSmallPages ? index * 128 << a.box_log2 : 0) {}
};

// TMA reads a page out of range as zeros.
constexpr int kNoPage = -1;

// Calls load(page id, first row in the page) of each lane's box of every tile of the items; a warp
// together. A box past the request's last page is of kNoPage.
template <bool kSmallPages, typename Load>
__device__ __forceinline__ void for_each_tile(const DecodeArguments& a, Box<kSmallPages> box,
                                              int first, int last, Load load) {
  const int lookup_tiles = 32 >> box.count_log2;  // whose pages a warp looks up at once
  const int tiles_per_page = kSmallPages ? 1 : a.tiles_per_page;
  for (int i = first; i < last; ++i) {
    const Item item(__ldg(a.items + i));
    const int32_t* table = a.block_table + item.request * a.block_table_stride;
    int end = item.page_end << box.count_log2;
    if (kSmallPages) end = min(end, request_boxes(a, item.request));
    for (int base = item.page_begin; base < item.page_end; base += lookup_tiles) {
      // Every lane looks up one page, so that table reads are a thirty-second of the waits.
      const int own = (base << box.count_log2) + threadIdx.x % 32;
      const int page_id = own < end ? __ldg(table + own / tiles_per_page) : kNoPage;
      const int count = min(lookup_tiles, item.page_end - base);
#pragma unroll 1  // keeps the code short: short requests pay for fetching it
      for (int j = 0; j < count; ++j) {
        load(__shfl_sync(~0u, page_id, (j << box.count_log2) + box.index),
             (base + j) % tiles_per_page * kTileTokens);
      }
    }
  }
}

// Whether a part's second page waits until Q is there: the first S needs Q and one page, so these
// go first. Not with a single page, since Q of the next item may be there by then, and a barrier
// two phases ahead looks like one that never completed.
__device__ __forceinline__ bool waits_for_queries(const DecodeArguments& a, int first, int last) {
  return first < last && Item(__ldg(a.items + first)).pages() > 1;
}

__device__ __forceinline__ void load_box(const DecodeArguments& a, void* destination,
                                         ptx::Mbarrier* barrier, int kv_head, int page, int row,
                                         int tile) {
  ptx::tma_load_5d(destination, &a.kv_map, barrier, 0, row, tile, kv_head, page, ptx::kEvictFirst);
}

template <bool kSmallPages>
__device__ __forceinline__ void stream_left(const DecodeArguments& a, DecodeShared& shared,
                                            int kv_head, int first, int last) {
  const int lane = threadIdx.x % 32;
  const Box<kSmallPages> box(a);
  Ring<kLeftStages> ring;
  bool hold = waits_for_queries(a, first, last);
  for_each_tile(a, box, first, last, [&](int page, int row) {
    const int stage = ring.stage;
    ptx::mbarrier_wait(&shared.left_empty[stage], ring.parity ^ 1);
    if (lane < 2)
      ptx::mbarrier_arrive_expect_tx(&shared.left_full[stage][lane], 2 * ptx::kTileBytes);
    __syncwarp();
    if (box.tile < kHalfTiles)
      load_box(a, shared.left[stage][box.tile] + box.offset, &shared.left_full[stage][box.tile / 2],
               kv_head, page, row, box.tile);
    // Only lanes that act on it wait: another might look when the slot is a phase further on.
    if (box.tile == kHalfTiles) {
      ptx::mbarrier_wait(&shared.rope_empty[stage], ring.parity ^ 1);
      if (box.index == 0) ptx::mbarrier_arrive_expect_tx(&shared.rope_full[stage], ptx::kTileBytes);
      if (kSmallPages) __syncwarp(((1 << (1 << box.count_log2)) - 1) << (lane - box.index));
      load_box(a, shared.rope[stage] + box.offset, &shared.rope_full[stage], kv_head, page, row,
               kRopeTile);
    }
    if (hold) ptx::mbarrier_wait(&shared.q_full, 0);
    hold = false;
    ring.advance();
  });
}

template <bool kSmallPages>
__device__ __forceinline__ void stream_right(const DecodeArguments& a, DecodeShared& shared,
                                             int kv_head, int first, int last) {
  const int lane = threadIdx.x % 32;
  const Box<kSmallPages> box(a);
  Ring<kRightStages> ring;
  bool hold = waits_for_queries(a, first, last);
  for_each_tile(a, box, first, last, [&](int page, int row) {
    const int stage = ring.stage;
    ptx::mbarrier_wait(&shared.right_empty[stage], ring.parity ^ 1);
    if (lane < 2)
      ptx::mbarrier_arrive_expect_tx(&shared.right_full[stage][lane], 2 * ptx::kTileBytes);
    __syncwarp();
    if (box.tile < kHalfTiles)
      load_box(a, shared.right[stage][box.tile] + box.offset,
               &shared.right_full[stage][box.tile / 2], kv_head, page, row, kHalfTiles + box.tile);
    if (hold) ptx::mbarrier_wait(&shared.q_full, 0);
    hold = false;
    ring.advance();
  });
}

// Warp 0 the left halves and rope columns, warp 1 the right halves.
template <bool kSmallPages>
__device__ __forceinline__ void stream_pages(const DecodeArguments& a, DecodeShared& shared,
                                             int kv_head, int first, int last) {
  if (threadIdx.x < 32) {
    stream_left<kSmallPages>(a, shared, kv_head, first, last);
  } else {
    stream_right<kSmallPages>(a, shared, kv_head, first, last);
  }
}

// Two warps; 48 of their threads own one 16-byte column of the tiles in shared memory each.
__device__ __forceinline__ void stream_queries(const DecodeArguments& a, DecodeShared& shared,
                                               int row_begin, int kv_head, int first, int last) {
  const int thread = threadIdx.x % 128 - 64;
  const int slot = thread / 8, chunk = thread % 8;
  const flashmla_query& part = slot == kFirstRegisterTile ? a.q_rope : a.q_latent;
  const int column = slot == kFirstRegisterTile ? chunk * 8 : slot * 64 + chunk * 8;
  const int rows = min(kTileRows, a.rows - row_begin);
  uint32_t parity = 0;
  for (int i = first; i < last; ++i) {
    const Item item(__ldg(a.items + i));
    if (item.pages() == 0) continue;
    ptx::mbarrier_wait(&shared.q_empty, parity ^ 1);
    if (slot < kTiles - kRegisterTiles) {
      int head = row_begin % a.group;
      const uint16_t* q = query_row(a, part, item.request, kv_head, row_begin) + column;
      const int64_t next_token = part.token_stride - (a.group - 1) * part.head_stride;
#pragma unroll 4
      for (int r = 0; r < rows; ++r) {
        ptx::copy_async_16(shared.q[slot] + r * 128 + ((chunk ^ (r % 8)) * 16), q);
        const bool wraps = ++head == a.group;
        if (wraps) head = 0;
        q += wraps ? next_token : part.head_stride;
      }
    }
    ptx::copy_async_wait_all();
    ptx::fence_async_proxy();
    ptx::mbarrier_arrive(&shared.q_full);
    parity ^= 1;
  }
}

}  // namespace flashmla
