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
  static constexpr int kSlots = kQueryTiles, kRopeSlot = kFirstRegisterTile, kParts = kQueryParts;
  static constexpr int kPlaces = kTileRows, kRows = kThreadRows == 1 ? kDealtRows : kTileRows;
  static constexpr int kTileBytes = ptx::kTileBytes;

  __device__ __forceinline__ static uint8_t* tile(DecodeShared& shared, int slot) {
    return shared.q[slot];
  }
  __device__ __forceinline__ static int row_at(int place) {
    return kThreadRows == 1 ? dealt_row_at(place) : place;
  }
  // Of those where a row may lie that of this number.
  __device__ __forceinline__ static int place(int number) {
    return kThreadRows == 1 ? number / 8 * 16 + number % 8 : number;
  }
};

// As B operand, which may have few rows: all its tiles.
struct FewQueries {
  static constexpr int kSlots = kTiles, kRopeSlot = kRopeTile, kParts = 1;
  static constexpr int kPlaces = kFewRows, kRows = kFewRows;
  static constexpr int kTileBytes = kFewRows * 128;

  __device__ __forceinline__ static uint8_t* tile(DecodeShared& shared, int slot) {
    return shared.q[0] + slot * kTileBytes;
  }
  __device__ __forceinline__ static int row_at(int place) { return place; }
  __device__ __forceinline__ static int place(int number) { return number; }
};

// What one of kThreads threads copies of an item's Q: the same 16-byte column of all tiles, of up
// to four rows. Where those lie in a request is worked out beforehand, so that the first item is
// not kept waiting: an address takes longer than a copy.
template <typename Queries, bool kRagged, int kThreads>
class QueryCopies {
 public:
  static constexpr int kPasses = Queries::kRows * 8 / kThreads > 4 ? 2 : 1;  // copies for all rows

  __device__ __forceinline__ QueryCopies(const DecodeArguments& a, DecodeShared& shared,
                                         int row_begin, int kv_head, int thread, int pass)
      : row_begin_(row_begin), kv_head_(kv_head), chunk_(thread % 8) {
    const int place = Queries::place(thread / 8 + pass * kRows * kGroups);
    first_row_ = Queries::row_at(place);
    rows_ = min(kTileRows, a.rows - row_begin);
    to_ = ptx::smem_address(Queries::tile(shared, 0)) + place * 128 + ((chunk_ ^ (place % 8)) * 16);
    if constexpr (kRagged) return;
#pragma unroll
    for (int j = 0; j < kRows; ++j) set_sources(a, j, 0, row_begin_ + row(j));
  }

  __device__ __forceinline__ void use_pointers() const {
    if constexpr (kRagged) return;
#pragma unroll
    for (int j = 0; j < kRows; ++j) ptx::use_pointer(latent_[j]), ptx::use_pointer(rope_[j]);
  }

  // One pair of tiles after the other becomes a group.
  __device__ __forceinline__ void start(const DecodeArguments& a, int request) {
    const int last = kRagged ? request_rows<kRagged>(a, request) - 1 : 0;
    const int64_t latent = request * a.q_latent.batch_stride;
    const int64_t rope = request * a.q_rope.batch_stride;
#pragma unroll
    for (int j = 0; j < kRows; ++j) {
      if constexpr (kRagged) {
        set_sources(a, j, request, min(row_begin_ + row(j), last));
      } else {
        latent_[j] += latent, rope_[j] += rope;
      }
      ptx::pin_register(latent_[j]);  // or every copy would work them out
      ptx::pin_register(rope_[j]);
    }
    start_slots<0>();
  }

 private:
  static constexpr int kGroups = kThreads / 8, kRows = Queries::kRows / kGroups / kPasses;
  // From one of a thread's rows to the next: in a tile, and among rows.
  static constexpr int kNextPlace = kGroups * (Queries::kPlaces / Queries::kRows);
  static constexpr int kNextRow = Queries::kPlaces > Queries::kRows ? kNextPlace / 16 : kNextPlace;
  static_assert(kNextPlace % 8 == 0, "all of a thread's rows are swizzled alike");

  __device__ __forceinline__ int row(int j) const { return first_row_ + j * kNextRow; }

  __device__ __forceinline__ void set_sources(const DecodeArguments& a, int j, int request,
                                              int row) {
    latent_[j] = query_row<kRagged>(a, a.q_latent, request, kv_head_, row) + chunk_ * 8;
    rope_[j] = query_row<kRagged>(a, a.q_rope, request, kv_head_, row) + chunk_ * 8;
  }

  template <int kSlot>
  __device__ __forceinline__ void start_slots() const {
    start_rows<kSlot, 0>();
    constexpr bool kLast = kSlot + 1 == Queries::kSlots;
    if constexpr (kLast || (Queries::kParts > 1 && kSlot % 2 == 1)) ptx::copy_async_commit();
    if constexpr (!kLast) start_slots<kSlot + 1>();
  }
  template <int kSlot, int j>
  __device__ __forceinline__ void start_rows() const {
    constexpr bool kRope = kSlot == Queries::kRopeSlot;
    constexpr int kTo = kSlot * Queries::kTileBytes + j * kNextPlace * 128;
    if (row(j) < rows_)
      ptx::copy_async_16<kTo, kRope ? 0 : kSlot * 128>(to_, kRope ? rope_[j] : latent_[j]);
    if constexpr (j + 1 < kRows) start_rows<kSlot, j + 1>();
  }

  int row_begin_, kv_head_, chunk_, first_row_, rows_;
  uint32_t to_;
  const uint16_t *latent_[kRows], *rope_[kRows];
};

// Q's parts kPart .. kParts - 1, each as soon as it is there.
template <int kPart, int kParts, int kThreads>
__device__ __forceinline__ void hand_over_queries(DecodeShared& shared) {
  ptx::copy_async_wait<kParts - 1 - kPart>();
  ptx::fence_async_proxy();
  ptx::mbarrier_arrive<kQueryArrivals / kThreads>(&shared.q_full[kPart]);
  if constexpr (kPart + 1 < kParts) hand_over_queries<kPart + 1, kParts, kThreads>(shared);
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

// By a warpgroup, when the kernel before has ended: then its items are known. The first one's Q is
// waited for, so that two warps would be few.
template <typename Queries, bool kRagged>
__device__ __forceinline__ PartItems load_first_queries(const DecodeArguments& a,
                                                        DecodeShared& shared, int row_begin,
                                                        int kv_head) {
  zero_absent_rows<Queries>(shared, a.rows - row_begin);
  using Copies = QueryCopies<Queries, kRagged, 128>;
  static_assert(Copies::kPasses == 1);
  Copies copies(a, shared, row_begin, kv_head, threadIdx.x % 128, 0);
  if (a.batch < 0) copies.use_pointers();  // never: so they are worked out by now
  const PartItems items(a);
  const int first = first_with_pages(a, items);
  if (first == items.last) return items;
  copies.start(a, items.item(a, first).request);
  hand_over_queries<0, Queries::kParts, 128>(shared);
  return items;
}

// By two warps: those of all further items.
template <typename Queries, bool kRagged>
__device__ __forceinline__ void stream_queries(const DecodeArguments& a, DecodeShared& shared,
                                               int row_begin, int kv_head, const PartItems& items) {
  using Copies = QueryCopies<Queries, kRagged, 64>;
  uint32_t parity = 0;
  for (int i = first_with_pages(a, items) + 1; i < items.last; ++i) {
    const Item item(a.items[i]);
    if (item.pages() == 0) continue;
    ptx::mbarrier_wait(&shared.q_empty, parity);
#pragma unroll 1
    for (int pass = 0; pass < Copies::kPasses; ++pass)
      Copies(a, shared, row_begin, kv_head, threadIdx.x % 128 - 64, pass).start(a, item.request);
    hand_over_queries<0, Queries::kParts, 64>(shared);
    parity ^= 1;
  }
}

}  // namespace flashmla
