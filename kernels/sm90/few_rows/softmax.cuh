// Online softmax of one tile of scores [64 tokens, kFewRows], by the left warpgroup.
#pragma once

#include "sm90/few_rows/shared.cuh"
#include "sm90/ptx/matrix.cuh"
#include "sm90/ptx/sync.cuh"
#include "sm90/softmax.cuh"

namespace flashmla::few_rows {

struct OnlineSoftmax {
  // Of the lane's row; all warps know the same.
  float maximum = kNegativeInfinity;  // in units of the scores
  float anchor = 0.0f;                // what exponents are relative to, in log2 units
  // Of the rows that this thread holds some of.
  float own_anchor[kOwnRows] = {};
  float slack_log2[kOwnRows];  // what an exponent may be before O is rescaled
  float sum[kOwnRows] = {};    // of this thread's tokens only

  __device__ __forceinline__ OnlineSoftmax() {
#pragma unroll
    for (float& x : slack_log2) x = kNegativeInfinity;
  }

  // Replaces scores by exponents of probabilities. Returns whether O must be multiplied by
  // `rescale`, of own rows, which is set only then, as is `rescale_row`, of the lane's. The barrier
  // that it takes also says that all have their scores. `seen`: pages of the item before this one,
  // of the request's `pages`.
  __device__ __forceinline__ bool advance(float (&scores)[kAccumulator], float scale_log2, int seen,
                                          int pages, Shared& shared, Room& room,
                                          float (&rescale)[kOwnRows], float& rescale_row) {
    const bool first = seen == 0;  // of which nobody knows anything
    bool grown = first;
    float exponents[kAccumulator];
    if (!first) {
#pragma unroll
      for (int i = 0; i < kAccumulator; ++i) {
        exponents[i] = exponent(scores[i], scale_log2, i);
        grown |= exponents[i] > slack_log2[row_index(i)];
      }
      grown = ptx::named_barrier_any(kLeftGroup, 128, grown);
    }
    if (grown) {
      float largest[kOwnRows];
#pragma unroll
      for (int r = 0; r < kOwnRows; ++r) {
        const int i = 4 * (r / 2) + r % 2;
        largest[r] = fmaxf(scores[i], scores[i + 2]);
      }
      shared.maximum.put(largest);
      if (!first) shared.growth.put(sum);
      ptx::named_barrier_sync(kLeftGroup, 128);
      const float next = fmaxf(maximum, shared.maximum.get());
      // A row that has seen no token keeps the anchor finite, so that exp2 gives 0 and not NaN.
      anchor = next == kNegativeInfinity ? 0.0f : next * scale_log2;
      rescale_row = ptx::exp2_fast(maximum * scale_log2 - anchor);
      maximum = next;
      float slack = 0.0f;
      if (!first) slack = slack_of(shared.growth.get() * rescale_row, seen, pages);
      float own[3][kOwnRows];
      room.share({anchor, next == kNegativeInfinity ? next : slack, rescale_row}, own);
#pragma unroll
      for (int r = 0; r < kOwnRows; ++r) {
        own_anchor[r] = own[0][r], slack_log2[r] = own[1][r], rescale[r] = own[2][r];
        sum[r] *= rescale[r];
      }
#pragma unroll
      for (int i = 0; i < kAccumulator; ++i) exponents[i] = exponent(scores[i], scale_log2, i);
    }
#pragma unroll
    for (int i = 0; i < kAccumulator; ++i) scores[i] = exponents[i];
    return grown;
  }

  // P^T to the tile that the products read, [kFewRows, 64 tokens].
  template <typename Element>
  __device__ __forceinline__ void store_probabilities(const float (&exponents)[kAccumulator],
                                                      uint8_t* tile) {
    const int warp = threadIdx.x % 128 / 32, lane = threadIdx.x % 32;
    uint32_t p[4];  // of eight tokens and eight rows each; two neighbours share rows
#pragma unroll
    for (int i = 0; i < kAccumulator; i += 2) {
      const float low = ptx::exp2_fast(exponents[i]), high = ptx::exp2_fast(exponents[i + 1]);
      sum[row_index(i)] += low, sum[row_index(i + 1)] += high;
      p[i / 2] = pack<Element>(low, high);
    }
    const int row = lane / 16 * 8 + lane % 8, chunk = (2 * warp + lane / 8 % 2) ^ (row % 8);
    ptx::store_transposed(ptx::smem_address(tile + row * 128 + chunk * 16), p);
  }

 private:
  __device__ __forceinline__ float exponent(float score, float scale_log2, int i) const {
    return fmaf(score, scale_log2, -own_anchor[row_index(i)]);
  }

  // A probability may be an eighth of what the sum is likely to be when the request ends; see
  // flashmla::OnlineSoftmax.
  __device__ __forceinline__ static float slack_of(float sum, int seen, int pages) {
    constexpr float kMost = 8.0f, kShare = 0.125f;
    const float growth = static_cast<float>(pages) * ptx::reciprocal_fast(seen);
    return fminf(fmaxf(ptx::log2_fast(kShare * growth * sum), 0.0f), kMost);
  }
};

}  // namespace flashmla::few_rows
