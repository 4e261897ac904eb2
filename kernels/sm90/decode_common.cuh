// What both decode kernels do alike, but for loading.
#pragma once

#include "sm90/decode_shared.cuh"
#include "sm90/ptx/mbarrier.cuh"
#include "sm90/ptx/sync.cuh"
#include "sm90/ptx/wgmma.cuh"

namespace flashmla {

// By one thread.
template <int kClusterSize>
__device__ __forceinline__ void init_barriers(DecodeShared& shared) {
  constexpr int kReleases = 4 * kClusterSize;  // of a slot, by the warps that read it
  for (ptx::Mbarrier& full : shared.q_full) ptx::mbarrier_init(&full, kQueryArrivals);
  ptx::mbarrier_init(&shared.q_empty, 4);
  for (int stage = 0; stage < kLeftStages; ++stage) {
    for (int pair = 0; pair < 2; ++pair) ptx::mbarrier_init(&shared.left_full[stage][pair], 1);
    ptx::mbarrier_init(&shared.left_empty[stage], kReleases);
    ptx::mbarrier_init(&shared.rope_full[stage], 1);
    ptx::mbarrier_init(&shared.rope_empty[stage], kReleases);
    ptx::mbarrier_init(&shared.p_full[stage], 128);  // all that wrote P and the factors
  }
  for (int stage = 0; stage < kRightStages; ++stage) {
    for (int pair = 0; pair < 2; ++pair) ptx::mbarrier_init(&shared.right_full[stage][pair], 1);
    ptx::mbarrier_init(&shared.right_empty[stage], kReleases);
    ptx::mbarrier_init(&shared.scores_issued[stage], 4);
  }
  ptx::mbarrier_init_fence();
}

// A page's column tiles as K, an operand of S.
struct PageKeys {
  uint64_t left, right, rope;

  __device__ __forceinline__ PageKeys(const DecodeShared& shared,
                                      const Ring<kLeftStages>& left_ring,
                                      const Ring<kRightStages>& right_ring)
      : left(ptx::matrix_descriptor(shared.left[left_ring.stage], 0)),
        right(ptx::matrix_descriptor(shared.right[right_ring.stage], 0)),
        rope(ptx::matrix_descriptor(shared.rope[left_ring.stage], 0)) {}

  __device__ __forceinline__ uint64_t tile(int tile) const {
    return tile == kRopeTile    ? rope
           : tile >= kHalfTiles ? right + (tile - kHalfTiles) * ptx::kNextTile
                                : left + tile * ptx::kNextTile;
  }
};

// Until that column tile is there, of a pair with the first of it.
__device__ __forceinline__ void wait_for_tile(DecodeShared& shared, const Ring<kLeftStages>& left,
                                              const Ring<kRightStages>& right, int tile) {
  if (tile == kRopeTile) {
    ptx::mbarrier_wait(&shared.rope_full[left.stage], left.parity);
  } else if (tile >= kHalfTiles && tile % 2 == 0) {
    ptx::mbarrier_wait(&shared.right_full[right.stage][(tile - kHalfTiles) / 2], right.parity);
  } else if (tile % 2 == 0) {
    ptx::mbarrier_wait(&shared.left_full[left.stage][tile / 2], left.parity);
  }
}

// Zeroes the V rows from `valid_rows` on of one half of a page, by the warpgroup that reads it:
// they may hold anything, NaN included, and 0 x NaN is NaN.
__device__ __forceinline__ void zero_tail(Tile* half, int valid_rows) {
  valid_rows = max(valid_rows, 0);  // a length may end before this page: then all of it
#pragma unroll 1
  for (int i = threadIdx.x % 128; i < (kTileTokens - valid_rows) * kHalfTiles * 8; i += 128) {
    const int row = valid_rows + i / (kHalfTiles * 8), tile = i / 8 % kHalfTiles, chunk = i % 8;
    *reinterpret_cast<uint4*>(half[tile] + row * 128 + chunk * 16) = uint4{};
  }
  ptx::fence_async_proxy();
}

}  // namespace flashmla
