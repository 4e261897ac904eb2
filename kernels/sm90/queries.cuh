// Where Q lies in shared memory, and what brings its valid rows there, by cp.async.
#pragma once

#include "sm90/decode_shared.cuh"
#include "sm90/ptx/copy.cuh"
#include "sm90/ptx/sync.cuh"

namespace flashmla {

// As A operand: tiles of 64 rows, without those that registers hold. With kThreadRows 1 rows are
// dealt to the warps.
template <int kThreadRows>
struct QueriesInTiles {
  static constexpr int kSlots = kQueryTiles, kPlaces = kTileRows, kParts = kQueryParts;

  __device__ __forceinline__ static uint8_t* tile(DecodeShared& shared, int slot) {
    return shared.q[slot];
  }
  __device__ __forceinline__ static int row_at(int place) {
    return kThreadRows == 1 ? dealt_row_at(place) : place;
  }

  // Each thread owns a 16-byte column of every tile, of every kStep-th row: an address takes longer
  // than a copy. Of kRows rows at a time it asks for one pair of tiles after the other.
  template <bool kRagged, int kThreads>
  __device__ __forceinline__ static void copy(const DecodeArguments& a, DecodeShared& shared,
                                              int row_begin, int kv_head, int request, int thread) {
    constexpr int kStep = kThreads / 8, kRows = 4;
    const int chunk = thread % 8;
    const int rows = min(kTileRows, a.rows - row_begin), own = request_rows<kRagged>(a, request);
#pragma unroll 1
    for (int first = thread / 8; first < kTileRows; first += kRows * kStep) {
      const uint16_t *latent[kRows], *rope[kRows];
      uint8_t* to[kRows];
#pragma unroll
      for (int j = 0; j < kRows; ++j) {
        const int r = first + j * kStep, place = place_of_row<kThreadRows>(r);
        const int row = kRagged ? min(row_begin + r, own - 1) : row_begin + r;
        latent[j] = query_row<kRagged>(a, a.q_latent, request, kv_head, row) + chunk * 8;
        rope[j] = query_row<kRagged>(a, a.q_rope, request, kv_head, row) + chunk * 8;
        to[j] = shared.q[0] + place * 128 + ((chunk ^ (place % 8)) * 16);
      }
#pragma unroll
      for (int slot = 0; slot < kSlots; ++slot) {
#pragma unroll
        for (int j = 0; j < kRows; ++j) {
          if (first + j * kStep < rows)
            ptx::copy_async_16(to[j] + slot * ptx::kTileBytes,
                               slot == kFirstRegisterTile ? rope[j] : latent[j] + slot * 64);
        }
        if (slot % 2 == 1) ptx::copy_async_commit();
      }
    }
  }
};

// As B operand, which may have few rows: all its tiles.
struct FewQueries {
  static constexpr int kSlots = kTiles, kPlaces = kFewRows, kTileBytes = kFewRows * 128;
  static constexpr int kParts = 1;

  __device__ __forceinline__ static uint8_t* tile(DecodeShared& shared, int slot) {
    return shared.q[0] + slot * kTileBytes;
  }
  __device__ __forceinline__ static int row_at(int place) { return place; }

  // Each thread owns a 16-byte column of every tile, of every kStep-th row.
  template <bool kRagged, int kThreads>
  __device__ __forceinline__ static void copy(const DecodeArguments& a, DecodeShared& shared, int,
                                              int kv_head, int request, int thread) {
    constexpr int kStep = kThreads / 8;
    const int chunk = thread % 8, own = request_rows<kRagged>(a, request);
#pragma unroll 1
    for (int r = thread / 8; r < a.rows; r += kStep) {
      const int row = kRagged ? min(r, own - 1) : r;
      const uint16_t* latent = query_row<kRagged>(a, a.q_latent, request, kv_head, row) + chunk * 8;
      const uint16_t* rope = query_row<kRagged>(a, a.q_rope, request, kv_head, row) + chunk * 8;
      uint8_t* const to = tile(shared, 0) + r * 128 + ((chunk ^ (r % 8)) * 16);
#pragma unroll
      for (int slot = 0; slot < kRopeTile; ++slot)
        ptx::copy_async_16(to + slot * kTileBytes, latent + slot * 64);
      ptx::copy_async_16(to + kRopeTile * kTileBytes, rope);
    }
    ptx::copy_async_commit();
  }
};

// Q's parts kPart .. kParts - 1, each as soon as it is there.
template <int kPart, int kParts, int kThreads>
__device__ __forceinline__ void hand_over_queries(DecodeShared& shared) {
  ptx::copy_async_wait<kParts - 1 - kPart>();
  ptx::fence_async_proxy();
  ptx::mbarrier_arrive<kQueryArrivals / kThreads>(&shared.q_full[kPart]);
  if constexpr (kPart + 1 < kParts) hand_over_queries<kPart + 1, kParts, kThreads>(shared);
}

// The valid rows of an item's Q by `kThreads` threads.
template <typename Queries, bool kRagged, int kThreads>
__device__ __forceinline__ void load_queries(const DecodeArguments& a, DecodeShared& shared,
                                             int row_begin, int kv_head, int request, int thread) {
  Queries::template copy<kRagged, kThreads>(a, shared, row_begin, kv_head, request, thread);
  hand_over_queries<0, Queries::kParts, kThreads>(shared);
}

// Of the items that have pages the first, or the end.
__device__ __forceinline__ int first_with_pages(const DecodeArguments& a, const PartItems& items) {
  int i = items.first;
  while (i < items.last && items.item(a, i).pages() == 0) ++i;
  return i;
}

// By a warpgroup. Rows that do not exist are zero for good: what lies in shared memory could be NaN
// or huge.
template <typename Queries>
__device__ __forceinline__ void zero_absent_rows(DecodeShared& shared, int rows) {
#pragma unroll 1
  for (int i = threadIdx.x % 128; i < Queries::kPlaces * 8; i += 128) {
    if (Queries::row_at(i / 8) < rows) continue;
#pragma unroll
    for (int slot = 0; slot < Queries::kSlots; ++slot)
      reinterpret_cast<uint4*>(Queries::tile(shared, slot))[i] = uint4{};
  }
}

// By a warpgroup. The first item's queries are waited for, so that two warps would be few.
template <typename Queries, bool kRagged>
__device__ __forceinline__ void load_first_queries(const DecodeArguments& a, DecodeShared& shared,
                                                   int row_begin, int kv_head,
                                                   const PartItems& items) {
  const int first = first_with_pages(a, items);
  if (first == items.last) return;
  load_queries<Queries, kRagged, 128>(a, shared, row_begin, kv_head, items.item(a, first).request,
                                      threadIdx.x % 128);
}

// By two warps: those of all further items.
template <typename Queries, bool kRagged>
__device__ __forceinline__ void stream_queries(const DecodeArguments& a, DecodeShared& shared,
                                               int row_begin, int kv_head, const PartItems& items) {
  uint32_t parity = 0;
  for (int i = first_with_pages(a, items) + 1; i < items.last; ++i) {
    const Item item(__ldg(a.items + i));
    if (item.pages() == 0) continue;
    ptx::mbarrier_wait(&shared.q_empty, parity);
    load_queries<Queries, kRagged, 64>(a, shared, row_begin, kv_head, item.request,
                                       threadIdx.x % 128 - 64);
    parity ^= 1;
  }
}

}  // namespace flashmla
