// Shared memory of the decode kernel, and what its roles have in common.
#pragma once

#include "sm90/decode_params.cuh"
#include "sm90/ptx/cluster.cuh"
#include "sm90/ptx/mbarrier.cuh"
#include "sm90/ptx/order.cuh"
#include "sm90/ptx/sync.cuh"
#include "sm90/ptx/wgmma.cuh"

namespace flashmla {

constexpr int kThreads = 384;
constexpr int kLeftStages = 2;
constexpr int kRightStages = 3;
constexpr int kHalfTiles = 4;  // column tiles of half a latent
constexpr int kRopeTile = kTiles - 1;
constexpr int kRegisterTiles = 3;                     // of Q: the last latent ones
constexpr int kQueryTiles = kTiles - kRegisterTiles;  // in shared memory
constexpr int kFirstRegisterTile = kRopeTile - kRegisterTiles;
constexpr int kQueryParts = kQueryTiles / 2;  // of Q, which arrives in pairs of tiles
constexpr int kQueryArrivals = 128;           // at q_full, by as many threads or by half
constexpr int kProducerRegisters = 56;
constexpr int kLeftRegisters = 248;
constexpr int kRightRegisters = 200;
static_assert(kProducerRegisters + kLeftRegisters + kRightRegisters == 3 * 168, "as launched");

using Tile = uint8_t[ptx::kTileBytes];

struct DecodeShared {
  alignas(1024) Tile q[kQueryTiles];  // the last one is rope
  alignas(1024) Tile left[kLeftStages][kHalfTiles];
  alignas(1024) Tile right[kRightStages][kHalfTiles];
  alignas(1024) Tile rope[kLeftStages];   // becomes P
  float rescale[kLeftStages][kTileRows];  // factor of O before this page's P V
  float sum[kLeftStages][kTileRows];      // of exponentials, of the item or leaf that ends here
  float anchor[kLeftStages][kTileRows];   // that they are relative to, in batch-invariant mode
  bool must_rescale[kLeftStages][4];      // by warp
  // Q and each half of a page arrive in pairs of tiles, so that S starts before they are complete.
  ptx::Mbarrier q_full[kQueryParts], q_empty;
  ptx::Mbarrier left_full[kLeftStages][2], left_empty[kLeftStages];
  ptx::Mbarrier right_full[kRightStages][2], right_empty[kRightStages];
  ptx::Mbarrier rope_full[kLeftStages], rope_empty[kLeftStages];
  ptx::Mbarrier p_full[kLeftStages];          // P and the factors are written
  ptx::Mbarrier scores_issued[kRightStages];  // S will soon no longer need the tensor cores
};
static_assert(sizeof(DecodeShared) + 1024 <= 232448, "shared memory of an SM");

static_assert(kLeftStages == 2, "blocks of a cluster take turns to load rope columns");

enum Barrier : int { kLeftGroup = 1, kRightGroup };  // named barriers; 0 is __syncthreads

template <int kStages>
struct Ring {
  int stage = 0;
  uint32_t parity = 0;
  __device__ __forceinline__ void advance() {
    if (++stage == kStages) {
      stage = 0;
      parity ^= 1;
    }
  }
  // Of the first page a slot whose phase before the first counts as complete.
  __device__ __forceinline__ Ring previous() const {
    return {stage == 0 ? kStages - 1 : stage - 1, stage == 0 ? parity ^ 1 : parity};
  }
};

// Blocks of neighbouring row tiles may be a cluster of kClusterSize: 1 or 2. It reads a page once:
// a column tile of a half page, or the rope columns of a slot, is loaded by one block for all.
template <int kClusterSize>
__device__ __forceinline__ int loader_of(int tile_or_stage) {
  return tile_or_stage % kClusterSize;
}

template <int kClusterSize>
__device__ __forceinline__ int cluster_rank() {
  return blockIdx.x % kClusterSize;
}

// Tells the block of that rank that this warp has read its part of what a slot holds.
template <int kClusterSize>
__device__ __forceinline__ void release(ptx::Mbarrier* empty, int rank) {
  if constexpr (kClusterSize == 1) {
    ptx::mbarrier_arrive(empty);
  } else {
    ptx::mbarrier_arrive_at(empty, rank);
  }
}

// The same of half a page, of which every block fills some.
template <int kClusterSize>
__device__ __forceinline__ void release_half(ptx::Mbarrier* empty) {
  const int lane = threadIdx.x % 32;
  if (lane < kClusterSize) release<kClusterSize>(empty, lane);
}

struct Item {
  int request, page_begin, page_end, split;
  __device__ __forceinline__ explicit Item(int4 v)
      : request(v.x), page_begin(v.y), page_end(v.z), split(v.w) {}
  __device__ __forceinline__ int pages() const { return page_end - page_begin; }
};

// Items first .. last - 1 of a thread block's part. In short batches the first one is mostly that
// of the part's own number: it is asked for at once, not when its place is known. All by ordinary
// loads: what __ldg says nobody writes the assembler asks for before the kernel has waited.
struct PartItems {
  int4 likely;
  int first, last;

  // Waits for the kernel before.
  __device__ __forceinline__ explicit PartItems(const DecodeArguments& a) {
    const int4* const own = a.items + blockIdx.z;
    const int32_t* const offsets = a.part_offsets + blockIdx.z;
    const bool never = a.batch < 0;
    if (never) ptx::use_pointer(own), ptx::use_pointer(offsets);  // so they are worked out by now
    ptx::wait_for_previous_kernel();
    likely = *own;
    first = offsets[0], last = offsets[1];
    if (never) ptx::use_pointer(a.items + likely.x);  // so it is asked for now
  }

  __device__ __forceinline__ Item item(const DecodeArguments& a, int i) const {
    return Item(i == static_cast<int>(blockIdx.z) ? likely : a.items[i]);
  }
};

// Row `row` of this KV head in one part of Q.
template <bool kRagged>
__device__ __forceinline__ const uint16_t* query_row(const DecodeArguments& a,
                                                     const flashmla_query& q, int request,
                                                     int kv_head, int row) {
  return static_cast<const uint16_t*>(q.data) +
         (kRagged ? __ldg(a.query_offsets + request) * q.token_stride : request * q.batch_stride) +
         a.group.divide(row) * q.token_stride +
         (kv_head * static_cast<int>(a.group.divisor) + a.group.remainder(row)) * q.head_stride;
}

// kThreadRows: rows of a 64-row accumulator that a thread holds and that may exist. Of two, rows
// lie in order. Up to kDealtRows are dealt to the warps, each to the first half of its sixteen: so
// all four warps share their softmax and their output, and nobody looks at second halves.
template <int kThreadRows>
__device__ __forceinline__ int accumulator_row(int r) {
  const int warp = threadIdx.x % 128 / 32, row = threadIdx.x % 32 / 4;
  return kThreadRows == 1 ? 4 * row + warp : 16 * warp + row + 8 * r;
}

// Which of dealt rows lies at a place; kTileRows: none.
__device__ __forceinline__ int dealt_row_at(int place) {
  return place % 16 < 8 ? place % 16 * 4 + place / 16 : kTileRows;
}

}  // namespace flashmla
