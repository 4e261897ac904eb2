// The producer warpgroup of the decode kernels: two warps load pages, by TMA, two load Q.
#pragma once

#include "sm90/bounds.cuh"
#include "sm90/decode_shared.cuh"
#include "sm90/ptx/copy.cuh"
#include "sm90/ptx/sync.cuh"
#include "sm90/queries.cuh"

namespace flashmla {

// A page of 64 tokens or more fills a column tile with a box, of small ones two or four do, one
// below the other; large ones are several tiles.
enum class Pages { kSmall, kTile, kLarge };

// What a lane loads of every tile of 64 tokens: one box.
template <Pages kPages>
struct Box {
  static constexpr bool kSmall = kPages == Pages::kSmall;
  int count_log2;  // boxes that fill a column tile
  int index;       // which of them
  int tile;        // column tile, 0 .. 31
  int offset;      // in its column tile, in bytes: whole swizzle atoms of 8 rows

  __device__ __forceinline__ explicit Box(const DecodeArguments& a)
      : count_log2(kSmall ? kTileLog2 - a.box_log2 : 0),
        index(threadIdx.x & ((1 << count_log2) - 1)),
        tile(threadIdx.x % 32 >> count_log2),
        offset(kSmall ? index * 128 << a.box_log2 : 0) {}
};

// TMA reads a page out of range as zeros.
constexpr int kNoPage = -1;

// Calls load(page id, first row in the page) of each lane's box of every tile of the items; a warp
// together. A box past the request's last page is of kNoPage.
template <Pages kPages, typename Load>
__device__ __forceinline__ void for_each_tile(const DecodeArguments& a, Box<kPages> box,
                                              const PartItems& items, Load load) {
  const int lookup_tiles = 32 >> box.count_log2;  // whose pages a warp looks up at once
  for (int i = items.first; i < items.last; ++i) {
    const Item item = items.item(a, i);
    const int32_t* table = a.block_table + item.request * a.block_table_stride;
    int end = item.page_end << box.count_log2;
    if (kPages == Pages::kSmall) end = min(end, request_boxes(a, item.request));
    for (int base = item.page_begin; base < item.page_end; base += lookup_tiles) {
      // Every lane looks up one page, so that table reads are a thirty-second of the waits.
      const int own = (base << box.count_log2) + threadIdx.x % 32;
      constexpr bool kLarge = kPages == Pages::kLarge;
      const int page = kLarge ? a.tiles_per_page.divide(own) : own;
      const int page_id = own < end ? table[page] : kNoPage;
      const int row = kLarge ? a.tiles_per_page.remainder(own) * kTileTokens : 0;
      const int count = min(lookup_tiles, item.page_end - base);
#pragma unroll 1  // keeps the code short: short requests pay for fetching it
      for (int j = 0; j < count; ++j) {
        const int lane = (j << box.count_log2) + box.index;
        load(__shfl_sync(~0u, page_id, lane), kLarge ? __shfl_sync(~0u, row, lane) : 0);
      }
    }
  }
}

// Whether a part's second page waits until Q is there, since the first S needs Q and one page:
// where few pages are to come. Where there are many, memory should not rest. Not with a single
// page: Q of the next item may be there by then, and a barrier two phases ahead looks like one that
// never completed.
__device__ __forceinline__ bool waits_for_queries(const DecodeArguments& a,
                                                  const PartItems& items) {
  if (items.first == items.last) return false;
  const int pages = items.item(a, items.first).pages();
  return pages == 2 || pages == 3;
}

// A box of a tile, for all blocks of the cluster. To be evicted first, a page would be gone before
// those that lag behind have read it: other clusters of row tiles, other query tiles of a request.
template <bool kRagged, int kClusterSize>
__device__ __forceinline__ void load_box(const DecodeArguments& a, void* destination,
                                         ptx::Mbarrier* barrier, int kv_head, int page, int row,
                                         int tile) {
  if constexpr (kClusterSize == 1) {
    ptx::tma_load_5d(destination, &a.kv_map, barrier, 0, row, tile, kv_head, page,
                     kRagged ? ptx::kEvictNormal : ptx::kEvictFirst);
  } else {
    const uint64_t policy = kRagged || gridDim.x > 2 ? ptx::kEvictNormal : ptx::kEvictFirst;
    ptx::tma_multicast_5d(destination, &a.kv_map, barrier, 0, row, tile, kv_head, page, 0b11,
                          policy);
  }
}

// A half page is asked for when the one before it is here: one on its way to each SM keeps memory
// busy, and a second would queue up in front of all else that SMs ask for.
template <int kStages>
__device__ __forceinline__ void wait_until_loaded(Ring<kStages> ring,
                                                  ptx::Mbarrier (&full)[kStages][2]) {
  ptx::mbarrier_wait(&full[ring.stage][1], ring.parity);
}

// After the last load: other blocks of the cluster still release the slots that this one fills, and
// it must not end before they have.
template <int kStages>
__device__ __forceinline__ void wait_until_empty(Ring<kStages> ring,
                                                 ptx::Mbarrier (&empty)[kStages]) {
#pragma unroll 1
  for (int i = 0; i < kStages; ++i) {
    ptx::mbarrier_wait(&empty[ring.stage], ring.parity ^ 1);
    ring.advance();
  }
}

// By each role where its own code begins: a branch to what lies far away takes its time, and should
// not do so when the items are there.
__device__ __forceinline__ PartItems begin_part(const DecodeArguments& a) {
  const PartItems items(a);
  // After its wait: the next kernel reads what this one has waited for before it waits itself.
  ptx::let_next_kernel_start();
  return items;
}

template <typename Queries, Pages kPages, bool kRagged, int kClusterSize>
__device__ __forceinline__ void stream_left(const DecodeArguments& a, DecodeShared& shared,
                                            int kv_head) {
  const int lane = threadIdx.x % 32, rank = cluster_rank<kClusterSize>();
  const Box<kPages> box(a);
  Ring<kLeftStages> ring;
  const PartItems items = begin_part(a);
  bool first = true;
  for_each_tile(a, box, items, [&](int page, int row) {
    const int stage = ring.stage;
    if (!first) {  // of which nobody has to wait for anything
      ptx::mbarrier_wait(&shared.left_empty[stage], ring.parity ^ 1);
      wait_until_loaded(ring.previous(), shared.left_full);
    }
    if (lane < 2)
      ptx::mbarrier_arrive_expect_tx(&shared.left_full[stage][lane], 2 * ptx::kTileBytes);
    __syncwarp();
    if (box.tile < kHalfTiles && loader_of<kClusterSize>(box.tile) == rank)
      load_box<kRagged, kClusterSize>(a, shared.left[stage][box.tile] + box.offset,
                                      &shared.left_full[stage][box.tile / 2], kv_head, page, row,
                                      box.tile);
    // Only lanes that act on it wait: another might look when the slot is a phase further on.
    if (box.tile == kHalfTiles) {
      // One block waits and loads for all; the others may expect it now that S has read the last.
      const bool loads = loader_of<kClusterSize>(stage) == rank;
      if (loads) ptx::mbarrier_wait(&shared.rope_empty[stage], ring.parity ^ 1);
      if (box.index == 0) ptx::mbarrier_arrive_expect_tx(&shared.rope_full[stage], ptx::kTileBytes);
      if (kPages == Pages::kSmall)
        __syncwarp(((1 << (1 << box.count_log2)) - 1) << (lane - box.index));
      if (loads)
        load_box<kRagged, kClusterSize>(a, shared.rope[stage] + box.offset,
                                        &shared.rope_full[stage], kv_head, page, row, kRopeTile);
    }
    if (first && waits_for_queries(a, items))
      ptx::mbarrier_wait(&shared.q_full[Queries::kParts - 1], 0);
    first = false;
    ring.advance();
  });
  if constexpr (kClusterSize > 1) {
    wait_until_empty(ring, shared.left_empty);
    if (ring.stage != rank) ring.advance();  // to the one slot whose rope columns it has loaded
    ptx::mbarrier_wait(&shared.rope_empty[rank], ring.parity ^ 1);
  }
}

template <typename Queries, Pages kPages, bool kRagged, int kClusterSize>
__device__ __forceinline__ void stream_right(const DecodeArguments& a, DecodeShared& shared,
                                             int kv_head) {
  const int lane = threadIdx.x % 32, rank = cluster_rank<kClusterSize>();
  const Box<kPages> box(a);
  Ring<kRightStages> ring;
  const PartItems items = begin_part(a);
  bool first = true;
  for_each_tile(a, box, items, [&](int page, int row) {
    const int stage = ring.stage;
    if (!first) {  // of which nobody has to wait for anything
      ptx::mbarrier_wait(&shared.right_empty[stage], ring.parity ^ 1);
      wait_until_loaded(ring.previous(), shared.right_full);
    }
    if (lane < 2)
      ptx::mbarrier_arrive_expect_tx(&shared.right_full[stage][lane], 2 * ptx::kTileBytes);
    __syncwarp();
    if (box.tile < kHalfTiles && loader_of<kClusterSize>(box.tile) == rank)
      load_box<kRagged, kClusterSize>(a, shared.right[stage][box.tile] + box.offset,
                                      &shared.right_full[stage][box.tile / 2], kv_head, page, row,
                                      kHalfTiles + box.tile);
    if (first && waits_for_queries(a, items))
      ptx::mbarrier_wait(&shared.q_full[Queries::kParts - 1], 0);
    first = false;
    ring.advance();
  });
  if constexpr (kClusterSize > 1) wait_until_empty(ring, shared.right_empty);
}

// Warp 0 the left halves and rope columns, warp 1 the right halves.
template <typename Queries, Pages kPages, bool kRagged, int kClusterSize>
__device__ __forceinline__ void stream_pages(const DecodeArguments& a, DecodeShared& shared,
                                             int kv_head) {
  if (threadIdx.x < 32) {
    stream_left<Queries, kPages, kRagged, kClusterSize>(a, shared, kv_head);
  } else {
    stream_right<Queries, kPages, kRagged, kClusterSize>(a, shared, kv_head);
  }
}

template <typename Queries, bool kRagged, int kClusterSize>
__device__ __forceinline__ void run_producer(const DecodeArguments& a, DecodeShared& of_block,
                                             int row_begin, int kv_head) {
  ptx::register_decrease<kProducerRegisters>();
  DecodeShared& shared = ptx::with_address_at_hand(of_block);
  if (threadIdx.x < 64) {
    if (a.box_log2 < kTileLog2) {
      stream_pages<Queries, Pages::kSmall, kRagged, kClusterSize>(a, shared, kv_head);
    } else if (a.tiles_per_page.divisor > 1) {
      stream_pages<Queries, Pages::kLarge, kRagged, kClusterSize>(a, shared, kv_head);
    } else {
      stream_pages<Queries, Pages::kTile, kRagged, kClusterSize>(a, shared, kv_head);
    }
  } else {
    const PartItems items = begin_part(a);
    stream_queries<Queries, kRagged>(a, shared, row_begin, kv_head, items);
    if (threadIdx.x < 96 && blockIdx.x + kv_head == 0)
      report_stale_plan(a, items.first, items.last);
  }
}

}  // namespace flashmla
